//! Tests of the search on a fake host: /sys, /proc and /dev in a directory.

use std::os::unix::fs::symlink;

use super::*;

struct FakeHost {
    root: tempfile::TempDir,
    host: Host,
}

impl FakeHost {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let host = Host { sys: at("sys"), proc: at("proc"), dev: at("dev") };
        let fake = Self { root, host };
        fake.put("proc/self/mountinfo", "");
        fake.put("proc/swaps", "Filename\tType\n");
        fake
    }

    fn put(&self, path: &str, content: &str) -> PathBuf {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn link(&self, from: &str, to: &str) {
        let from = self.root.path().join(from);
        fs::create_dir_all(from.parent().unwrap()).unwrap();
        symlink(self.root.path().join(to), from).unwrap();
    }

    /// Makes a disk of the host with this number, such as 7:0, and its partitions.
    fn disk(&self, name: &str, number: &str, partitions: &[(&str, &str)]) {
        self.put(&format!("sys/devices/{name}/dev"), &format!("{number}\n"));
        self.link(&format!("sys/block/{name}"), &format!("sys/devices/{name}"));
        self.link(&format!("sys/dev/block/{number}"), &format!("sys/devices/{name}"));
        for (partition, number) in partitions {
            let place = format!("sys/devices/{name}/{partition}");
            self.put(&format!("{place}/partition"), "1\n");
            self.put(&format!("{place}/dev"), &format!("{number}\n"));
            self.link(&format!("sys/dev/block/{number}"), &place);
        }
    }

    fn attach(&self, name: &str, number: &str, file: &Path, readonly: bool) {
        self.disk(name, number, &[]);
        self.put(&format!("sys/devices/{name}/loop/backing_file"), &format!("{}\n", file.display()));
        self.put(&format!("sys/devices/{name}/ro"), if readonly { "1\n" } else { "0\n" });
    }

    fn mount(&self, device: &str, source: &str, point: &str, options: &str) {
        let line = format!("36 35 {device} / {point} rw,relatime shared:1 - ext4 {source} {options}\n");
        let place = self.root.path().join("proc/self/mountinfo");
        fs::write(&place, fs::read_to_string(&place).unwrap() + &line).unwrap();
    }

    fn uses_of_file(&self, path: &Path) -> Vec<HostUse> {
        self.host.uses_of(&fs::metadata(path).unwrap())
    }

    /// Searches by number, because not every user can make a block device.
    fn uses_of_device(&self, number: &str) -> Vec<HostUse> {
        let (device, loops, mut uses) = (Device::parse(number).unwrap(), self.host.loops(), Vec::new());
        self.host.add_uses(Node::Block(device), "it", &loops, &mut uses, 0);
        self.host.add_family(device, &loops, &mut uses);
        self.host.add_below(device, &loops, &mut uses);
        uses
    }
}

fn words(uses: &[HostUse]) -> Vec<(&str, bool)> {
    uses.iter().map(|it| (it.what.as_str(), it.writes)).collect()
}

#[test]
fn a_file_that_nobody_uses_has_no_uses() {
    let fake = FakeHost::new();
    let image = fake.put("a.img", "x");
    fake.attach("loop0", "7:0", &fake.put("b.img", "x"), false);
    fake.mount("7:0", "/dev/loop0", "/mnt", "rw");
    assert_eq!(fake.uses_of_file(&image), []);
}

#[test]
fn a_loop_device_is_found_by_the_file_whatever_its_name() {
    let fake = FakeHost::new();
    let image = fake.put("a.img", "x");
    let other = fake.root.path().join("other name.img");
    fs::hard_link(&image, &other).unwrap();
    fake.attach("loop3", "7:3", &other, false);
    let uses = fake.uses_of_file(&image);
    let device = fake.root.path().join("dev/loop3").display().to_string();
    assert_eq!(words(&uses), [(format!("the loop device {device} is attached to it").as_str(), true)]);
    assert_eq!(uses[0].remedy, Some(format!("losetup -d {device}")));

    fake.mount("7:3", "/dev/loop3", "/mnt/a\\040b", "rw,errors=continue");
    let uses = fake.uses_of_file(&image);
    assert_eq!(uses[0].what, format!("{device} is mounted on /mnt/a b"));
    assert_eq!(uses[0].remedy.as_deref(), Some("umount '/mnt/a b'"));
    assert!(in_words(&uses).contains("umount '/mnt/a b'; losetup -d"), "{}", in_words(&uses));
}

#[test]
fn what_the_host_only_reads_is_told_as_such() {
    let fake = FakeHost::new();
    let image = fake.put("a.img", "x");
    fake.attach("loop0", "7:0", &image, true);
    assert!(fake.uses_of_file(&image).iter().all(|it| !it.writes));

    let image = fake.put("b.img", "x");
    fake.attach("loop1", "7:1", &image, false);
    assert!(fake.uses_of_file(&image).iter().any(|it| it.writes), "it may be written to at any time");
    fake.mount("7:1", "/dev/loop1", "/mnt", "ro");
    assert!(fake.uses_of_file(&image).iter().all(|it| !it.writes));
}

#[test]
fn swap_and_mounts_without_a_loop_device_are_found() {
    let fake = FakeHost::new();
    let (swap, image) = (fake.put("swap file", "x"), fake.put("a.img", "x"));
    let name = swap.display().to_string().replace(' ', "\\040");
    fake.put("proc/swaps", &format!("Filename Type Size Used Priority\n{name} file 1 0 -2\n"));
    assert_eq!(words(&fake.uses_of_file(&swap)), [("it is swap space", true)]);
    // As fuse2fs and erofs mount it.
    fake.mount("0:55", &image.display().to_string(), "/mnt", "ro");
    assert_eq!(words(&fake.uses_of_file(&image)), [("it is mounted on /mnt", false)]);
}

#[test]
fn partitions_their_disk_and_what_is_made_of_them_count() {
    let fake = FakeHost::new();
    fake.disk("sda", "8:0", &[("sda1", "8:1"), ("sda2", "8:2"), ("sda3", "8:3")]);
    fake.put("sys/devices/sda/sda2/holders/dm-0/ro", "0\n");
    fake.mount("8:1", "/dev/sda1", "/", "rw");
    let dev = |name: &str| fake.host.dev.join(name).display().to_string();
    assert_eq!(words(&fake.uses_of_device("8:1")), [("it is mounted on /", true)]);
    assert_eq!(
        words(&fake.uses_of_device("8:2")),
        [(format!("it is a part of {}", dev("dm-0")).as_str(), true)]
    );
    assert_eq!(fake.uses_of_device("8:3"), [], "its neighbours are no business of its own");
    let whole = fake.uses_of_device("8:0");
    assert_eq!(
        words(&whole),
        [
            (format!("{} is mounted on /", dev("sda1")).as_str(), true),
            (format!("{} is a part of {}", dev("sda2"), dev("dm-0")).as_str(), true)
        ]
    );
}

#[test]
fn a_loop_device_shares_its_file_with_other_loop_devices() {
    let fake = FakeHost::new();
    let image = fake.put("a.img", "x");
    fake.attach("loop0", "7:0", &image, false);
    assert_eq!(fake.uses_of_device("7:0"), []);
    fake.attach("loop1", "7:1", &image, false);
    let uses = fake.uses_of_device("7:0");
    assert!(uses.len() == 1 && uses[0].what.contains("loop1 is attached to"), "{uses:?}");
}

#[test]
fn a_btrfs_of_several_devices_holds_each() {
    let fake = FakeHost::new();
    fake.disk("sdb", "8:16", &[]);
    fake.disk("sdc", "8:32", &[]);
    fake.link("sys/fs/btrfs/1234/devices/sdb", "sys/devices/sdb");
    assert_eq!(fake.uses_of_device("8:16"), []);
    fake.link("sys/fs/btrfs/1234/devices/sdc", "sys/devices/sdc");
    assert_eq!(words(&fake.uses_of_device("8:16")), [("it is a part of the mounted btrfs 1234", true)]);
}

#[test]
fn two_names_for_the_same_bytes_are_known() {
    let fake = FakeHost::new();
    let image = fake.put("a.img", "x");
    fake.attach("loop0", "7:0", &image, false);
    fake.attach("loop1", "7:1", &image, false);
    fake.attach("loop2", "7:2", &fake.put("b.img", "x"), false);
    fake.disk("sda", "8:0", &[("sda1", "8:1"), ("sda2", "8:2")]);
    let file = Node::at(&image).unwrap();
    let block = |number: &str| Node::Block(Device::parse(number).unwrap());
    for (a, b, same) in [
        (file, file, true),
        (file, block("7:0"), true),
        (block("7:0"), block("7:1"), true),
        (block("7:0"), block("7:2"), false),
        (file, block("7:2"), false),
        (block("8:0"), block("8:1"), true),
        (block("8:1"), block("8:2"), false),
        (block("8:1"), file, false),
    ] {
        assert_eq!(fake.host.share_bytes(a, b), same, "{a:?} {b:?}");
        assert_eq!(fake.host.share_bytes(b, a), same, "{b:?} {a:?}");
    }
}
