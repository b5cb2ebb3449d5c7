//! The kernel's own description of its types (BTF, /sys/kernel/btf/vmlinux): where a field lies in a
//! structure of the kernel that runs, and how many arguments a tracepoint has.
//!
//! Owns the format's reading, as far as that needs it (Documentation/bpf/btf.rst).

const MAGIC: u16 = 0xeb9f;
/// Kinds of types.
const PTR: u32 = 2;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const TYPEDEF: u32 = 8;
const FUNC_PROTO: u32 = 13;

/// All types of the kernel.
pub struct Btf {
    bytes: Vec<u8>,
    strings: usize,
    /// Where each type begins, by its number; the first is `void`.
    types: Vec<usize>,
}

struct Type {
    at: usize,
    kind: u32,
    count: usize,
    /// Offsets of members share their word with the sizes of bit fields.
    has_bit_fields: bool,
    of: usize,
}

impl Btf {
    /// The running kernel's; the error is a reason in words.
    pub fn read() -> Result<Self, String> {
        let path = "/sys/kernel/btf/vmlinux";
        let bytes = std::fs::read(path).map_err(|error| format!("cannot read {path}: {error}"))?;
        let mut btf = Self { bytes, strings: 0, types: vec![0] };
        if btf.bytes.len() < 24 || u16::from_le_bytes([btf.bytes[0], btf.bytes[1]]) != MAGIC {
            return Err(format!("{path} is no BTF"));
        }
        let header = btf.word(4);
        let (first, end) = (header + btf.word(8), header + btf.word(8) + btf.word(12));
        btf.strings = header + btf.word(16);
        let mut at = first;
        while at < end {
            btf.types.push(at);
            at += 12 + btf.tail(at);
        }
        Ok(btf)
    }

    fn word(&self, at: usize) -> usize {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap()) as usize
    }

    /// Bytes behind the three words that every type begins with.
    fn tail(&self, at: usize) -> usize {
        let info = self.word(at + 4);
        let count = info & 0xffff;
        match info >> 24 & 0x1f {
            1 | 14 | 17 => 4,
            3 => 12,
            4 | 5 | 15 | 19 => 12 * count,
            6 | 13 => 8 * count,
            _ => 0,
        }
    }

    fn name(&self, at: usize) -> &str {
        let start = self.strings + self.word(at);
        let len = self.bytes[start..].iter().position(|&byte| byte == 0).unwrap_or(0);
        std::str::from_utf8(&self.bytes[start..start + len]).unwrap_or_default()
    }

    fn get(&self, number: usize) -> Type {
        let at = self.types[number];
        let info = self.word(at + 4);
        Type {
            at,
            kind: u32::try_from(info >> 24 & 0x1f).unwrap(),
            count: info & 0xffff,
            has_bit_fields: info >> 31 != 0,
            of: self.word(at + 8),
        }
    }

    fn find(&self, kinds: &[u32], name: &str) -> Result<usize, String> {
        (1..self.types.len())
            .find(|&number| {
                let found = self.get(number);
                kinds.contains(&found.kind) && self.name(found.at) == name
            })
            .ok_or_else(|| format!("this kernel's BTF has no {name}"))
    }

    /// Where `path` (fields with dots between) begins in the structure, in bytes.
    pub fn offset(&self, structure: &str, path: &str) -> Result<i32, String> {
        let mut number = self.find(&[STRUCT], structure)?;
        let mut bits = 0;
        for field in path.split('.') {
            let (at, of) = self
                .member(number, field)
                .ok_or_else(|| format!("this kernel's {structure} has no {path}"))?;
            (bits, number) = (bits + at, of);
        }
        i32::try_from(bits / 8).map_err(|_| format!("{structure}.{path} is too far out"))
    }

    /// A field, also inside of members that have no name: its offset in bits, and its type.
    fn member(&self, number: usize, field: &str) -> Option<(usize, usize)> {
        let found = self.get(number);
        if found.kind == TYPEDEF {
            return self.member(found.of, field);
        }
        if found.kind != STRUCT && found.kind != UNION {
            return None;
        }
        (0..found.count).map(|index| found.at + 12 + 12 * index).find_map(|at| {
            let word = self.word(at + 8);
            let bits = if found.has_bit_fields { word & 0x00ff_ffff } else { word };
            let of = self.word(at + 4);
            match self.name(at) {
                name if name == field => Some((bits, of)),
                "" => self.member(of, field).map(|(inner, of)| (bits + inner, of)),
                _ => None,
            }
        })
    }

    /// How many arguments the tracepoint hands to a probe.
    pub fn tracepoint_arguments(&self, name: &str) -> Result<usize, String> {
        let pointer = self.get(self.find(&[TYPEDEF], &format!("btf_trace_{name}"))?).of;
        let proto = self.get(self.get(pointer).of);
        if self.get(pointer).kind != PTR || proto.kind != FUNC_PROTO {
            return Err(format!("the tracepoint {name} is no function"));
        }
        // The first is the probe's own.
        Ok(proto.count - 1)
    }
}
