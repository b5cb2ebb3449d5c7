//! A cpio archive ("newc") with one job for the test guest, to be put behind its initramfs.

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
