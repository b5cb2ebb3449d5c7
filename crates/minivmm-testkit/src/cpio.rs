//! A cpio archive ("newc") with one job for the test guest, to be put behind its initramfs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `/job/run` with this content. The kernel unpacks archives one after another.
pub fn job(script: &str) -> Vec<u8> {
    job_with(script, &[])
}

/// The same with programs beside it: `/job/NAME`.
pub fn job_with(script: &str, programs: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, "job", 0o040_755, b"");
    entry(&mut archive, "job/run", 0o100_755, format!("#!/bin/sh\n{script}\n").as_bytes());
    for (name, program) in programs {
        entry(&mut archive, &format!("job/{name}"), 0o100_755, program);
    }
    entry(&mut archive, "TRAILER!!!", 0, b"");
    archive
}

/// Programs of this machine with their libraries and their loader, in `/job/host`: a guest whose own libraries are
/// others runs one as `/job/host/ld.so --library-path /job/host /job/host/NAME`.
///
/// # Panics
///
/// Where one of `programs` is no dynamic program of this machine.
pub fn host_programs(programs: &[&Path]) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, "job", 0o040_755, b"");
    entry(&mut archive, "job/host", 0o040_755, b"");
    let mut files = BTreeMap::new();
    for program in programs {
        let ldd = Command::new("ldd").arg(program).output().unwrap();
        assert!(ldd.status.success(), "{}: {ldd:?}", program.display());
        let listed = String::from_utf8_lossy(&ldd.stdout).into_owned();
        let paths = listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
        for path in paths.chain([program.to_path_buf()]) {
            let name = path.file_name().unwrap().to_str().unwrap();
            let name = if name.starts_with("ld-linux") { "ld.so" } else { name };
            files.insert(name.to_owned(), path.clone());
        }
    }
    for (name, path) in files {
        entry(&mut archive, &format!("job/host/{name}"), 0o100_755, &std::fs::read(path).unwrap());
    }
    entry(&mut archive, "TRAILER!!!", 0, b"");
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let name_size = name.len() + 1;
    // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
    // namesize, check: eight hexadecimal digits each.
    let header = format!(
        "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
        0,
        0,
        0,
        1,
        0,
        data.len(),
        0,
        0,
        0,
        0,
        0
    );
    archive.extend(header.as_bytes());
    archive.extend(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend(data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
