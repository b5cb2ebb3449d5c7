//! All ways to name a file that must not be lost, and all ways to name one that may be written to.

use std::io::Seek;
use std::os::unix::fs::symlink;

use rustix::fs::FlockOperation;

use super::*;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn put(&self, name: &str, content: &[u8]) -> PathBuf {
        fs::write(self.at(name), content).unwrap();
        self.at(name)
    }
}

fn with(inputs: &[&Path], outputs: Vec<Output>) -> Inventory {
    let input = |path: &&Path| Input { option: "--disk", path: path.to_path_buf() };
    Inventory { inputs: inputs.iter().map(input).collect(), outputs }
}

/// Asserts that the check and the opening both refuse the output, name the path and change nothing.
fn must_be_refused(inventory: &Inventory, output: &Output, word: &str) {
    let before = fs::read(&output.path).ok();
    let mut all = inventory.clone();
    all.outputs.push(output.clone());
    let checked = all.check();
    assert_eq!(checked.len(), 1, "{checked:?}");
    let opened = inventory.open(output).unwrap_err();
    for error in [checked[0].to_string(), opened.to_string()] {
        assert!(error.contains(word) && error.contains(&output.path.display().to_string()), "{error}");
        assert!(error.contains(output.option), "{error}");
    }
    assert_eq!(fs::read(&output.path).ok(), before, "{word}");
}

#[test]
fn an_input_is_refused_by_whatever_name_it_has() {
    let place = Place::new();
    let image = place.put("a.img", b"{ as JSON begins }");
    fs::hard_link(&image, place.at("hard")).unwrap();
    symlink("a.img", place.at("soft")).unwrap();
    fs::create_dir(place.at("dir")).unwrap();
    let inventory = with(&[&image], vec![]);
    for name in ["a.img", "hard", "soft", "dir/../a.img"] {
        for output in
            [Output::text("--status-file", place.at(name)), Output::text("--console", place.at(name))]
        {
            must_be_refused(&inventory, &output, "same file as --disk");
        }
    }
}

#[test]
fn two_outputs_do_not_share_a_file_that_is_there_or_will_be() {
    let place = Place::new();
    fs::create_dir(place.at("dir")).unwrap();
    symlink("dir", place.at("link")).unwrap();
    symlink("dir/new", place.at("dangling")).unwrap();
    place.put("there", b"");
    for (first, second) in
        [("there", "there"), ("dir/new", "dir/new"), ("dir/new", "link/new"), ("dir/new", "dangling")]
    {
        let others = with(&[], vec![Output::text("--status-file", place.at(first))]);
        must_be_refused(&others, &Output::text("--stats", place.at(second)), "--status-file");
        assert!(!place.at("dir/new").exists());
    }
    // The same option given twice is treated alike.
    let log = |name: &str| Output::text("log-writes=", place.at(name));
    assert_eq!(with(&[], vec![log("l"), log("l")]).check().len(), 1);
    assert_eq!(with(&[], vec![log("l"), log("m")]).check().len(), 0);
}

#[test]
fn what_somebody_has_locked_as_an_image_is_refused() {
    let place = Place::new();
    let image = place.put("a.img", b"text");
    let theirs = File::options().read(true).write(true).open(&image).unwrap();
    let mut lock = locks::whole_file(true);
    // A shared lock on one byte, as QEMU takes.
    (lock.l_start, lock.l_len) = (100, 1);
    // SAFETY: `lock` is a valid flock for the length of the call.
    let taken =
        unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&theirs), libc::F_OFD_SETLK, &raw const lock) };
    assert_eq!(taken, 0);
    must_be_refused(&Inventory::default(), &Output::text("--console", &image), "has locked it");
}

#[test]
fn directories_and_places_that_are_none_are_refused() {
    let place = Place::new();
    let text = |name: &str| Output::text("--console", place.at(name));
    must_be_refused(&Inventory::default(), &text(""), "a directory");
    must_be_refused(&Inventory::default(), &text("missing/new"), "directory");
}

#[test]
fn an_older_output_of_the_same_kind_is_replaced_and_nothing_else() {
    let place = Place::new();
    let mut gzip = vec![0x1f, 0x8b, 8, 0];
    gzip.extend([7; 100]);
    let cases: [(&[u8], bool); 8] = [
        (b"", true),
        (b"{\"version\": 1}\n", true),
        (b"pending\n", true),
        ("[    0.000000] Linux version \u{1b}[31m".as_bytes(), true),
        (&[0; 8192], false),
        (b"QFI\xfb\0\0\0\x03", false),
        (b"070701\0", false),
        (&gzip, false),
    ];
    for (content, may) in cases {
        for option in ["--status-file", "--console"] {
            let output = Output::text(option, place.put("x", content));
            if may {
                let opened = Inventory::default().open(&output).unwrap();
                assert!(opened.is_ours);
                assert_eq!(fs::read(place.at("x")).unwrap(), b"", "{output:?}");
            } else {
                must_be_refused(&Inventory::default(), &output, "would be lost");
            }
        }
    }
}

#[test]
fn an_older_report_stays_until_it_is_replaced() {
    let place = Place::new();
    let output = Output::text("--json", place.put("r.json", b"{}"));
    let opened = Inventory::default().open_unchanged(&output).unwrap();
    assert_eq!(fs::read(&output.path).unwrap(), b"{}");
    drop(emptied(opened).unwrap());
    assert_eq!(fs::read(&output.path).unwrap(), b"");
    replace(&output, "{\"a\": 1}").unwrap();
    assert_eq!(fs::read(&output.path).unwrap(), b"{\"a\": 1}");
    let image = Output::text("--json", place.put("a.img", &[0; 512]));
    assert!(replace(&image, "{}").is_err());
    assert_eq!(fs::read(&image.path).unwrap(), [0; 512]);
    assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 2, "nothing is left behind");
}

#[test]
fn pipes_and_devices_are_taken_by_several() {
    let place = Place::new();
    let fifo = place.at("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let _reader = File::options().read(true).write(true).open(&fifo).unwrap();
    for path in [Path::new("/dev/null"), &fifo] {
        let outputs = vec![Output::text("--status-file", path), Output::text("--stats", path)];
        let inventory = with(&[Path::new("/dev/null")], outputs.clone());
        assert!(inventory.check().is_empty(), "{:?}", inventory.check());
        for output in &outputs {
            assert!(!inventory.open(output).unwrap().is_ours);
        }
    }
}

#[test]
fn a_descriptor_of_ours_is_written_on_where_it_stands() {
    let place = Place::new();
    let mut file = File::create(place.at("out")).unwrap();
    file.write_all(b"before ").unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    let output = Output::text("--stats", format!("/proc/self/fd/{number}"));
    let opened = Inventory::default().open(&output).unwrap();
    assert!(!opened.is_ours);
    (&opened.file).write_all(b"{}").unwrap();
    file.write_all(b" after").unwrap();
    assert_eq!(fs::read(place.at("out")).unwrap(), b"before {} after");
    // A disk is still refused.
    let inventory = with(&[&place.at("out")], vec![]);
    must_be_refused(&inventory, &output, "same file as --disk");
    assert_eq!(file.stream_position().unwrap(), 15);
}

#[test]
fn only_an_older_image_of_the_same_size_becomes_one_again() {
    let place = Place::new();
    let base = place.put("base", &[1; 1024]);
    let input = || vec![Input { option: "--base", path: base.clone() }];
    let may = |name: &str| {
        let output = Output { option: "--write", path: place.at(name), content: IMAGE };
        may_become_image(&output, input(), 1024).map_err(|error| error.to_string())
    };
    place.put("older", &[2; 1024]);
    place.put("notes", b"text");
    for (name, word) in [("base", "--base"), ("notes", "same size")] {
        assert!(may(name).unwrap_err().contains(word), "{name}");
    }
    assert_eq!((may("older"), may("new")), (Ok(()), Ok(())));
}

#[test]
fn a_reader_with_a_flock_does_not_keep_a_report_from_being_written() {
    let place = Place::new();
    let path = place.put("s.json", b"{}");
    let reader = File::open(&path).unwrap();
    rustix::fs::flock(&reader, FlockOperation::LockShared).unwrap();
    assert!(Inventory::default().open(&Output::text("--stats", &path)).is_ok());
}
