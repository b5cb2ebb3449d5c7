//! Firmware and boot loaders as drivers of our device: SeaBIOS and OVMF find GRUB on one disk image, GRUB reads a kernel
//! and an initramfs from it, and Linux reads the whole image again.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use minivmm_testkit::skips::skip;
use minivmm_testkit::{cpio, images};

use super::daemon::{Daemon, Export};
use super::is_torture;
use super::qemu::{self, Heard, Machine, can_run};

const IMAGE_MIB: u64 = 96;
/// Where the only partition begins; GRUB's core lies before it.
const PARTITION: u64 = 1 << 20;
const SECTOR: u64 = 512;

const BIOS: &str = "/usr/lib/grub/i386-pc";
const EFI: &str = "/usr/lib/grub/x86_64-efi";
const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// What GRUB does on its own.
const GRUB: &str = "serial --unit=0 --speed=115200
terminal_output serial
search --no-floppy --file --set=root /vmlinuz
echo GRUB has found the disk
linux /vmlinuz console=ttyS0 quiet panic=-1 no_timer_check
initrd /initrd.cpio
boot
";

const JOB: &str = r#"
tell sum $(dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum)
dd if=/dev/zero of=/dev/vda bs=512 count=1 seek=1024 conv=notrunc,fsync 2>/dev/null; tell write $?
tell efi $(ls -d /sys/firmware/efi 2>/dev/null || echo no)
"#;

fn run(command: &mut Command) {
    let done = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {done:?}");
}

/// GRUB as one file for this platform, with what it needs to do its job.
fn grub(dir: &Path, platform: &str, modules: &[&str]) -> Vec<u8> {
    fs::write(dir.join("grub.cfg"), GRUB).unwrap();
    let directory = if platform == "i386-pc" { BIOS } else { EFI };
    let mut mkimage = Command::new("grub-mkimage");
    mkimage.args(["-O", platform, "-d", directory, "-p", "/grub", "-c", "grub.cfg", "-o", "grub.image"]);
    mkimage.args([
        "normal",
        "part_msdos",
        "fat",
        "linux",
        "echo",
        "serial",
        "terminal",
        "search",
        "search_fs_file",
    ]);
    run(mkimage.args(modules).current_dir(dir));
    fs::read(dir.join("grub.image")).unwrap()
}

/// A disk that BIOS and UEFI boot: an MBR, GRUB's core behind it, and a FAT partition with GRUB for UEFI, the kernel and
/// the initramfs.
fn make_disk(dir: &Path, image: &Path, kernel: &str) {
    let disk = File::create_new(image).unwrap();
    disk.set_len(IMAGE_MIB << 20).unwrap();
    // GRUB's first sector, which looks for its core in the next one, as the core for its rest: its own defaults.
    let boot = fs::read(format!("{BIOS}/boot.img")).unwrap();
    disk.write_all_at(&boot[..440], 0).unwrap();
    let core = grub(dir, "i386-pc", &["biosdisk"]);
    assert!((core.len() as u64) < PARTITION - SECTOR);
    disk.write_all_at(&core, SECTOR).unwrap();
    let sectors = ((IMAGE_MIB << 20) - PARTITION) / SECTOR;
    // Active, of the type of an EFI system partition; addresses in cylinders are not used.
    let mut entry = vec![0x80, 0xfe, 0xff, 0xff, 0xef, 0xfe, 0xff, 0xff];
    entry.extend(u32::try_from(PARTITION / SECTOR).unwrap().to_le_bytes());
    entry.extend(u32::try_from(sectors).unwrap().to_le_bytes());
    disk.write_all_at(&entry, 446).unwrap();
    disk.write_all_at(&[0x55, 0xaa], 510).unwrap();

    let place = format!("{}@@{PARTITION}", image.display());
    run(Command::new("mformat").args([
        "-i",
        &place,
        "-T",
        &sectors.to_string(),
        "-h",
        "64",
        "-s",
        "32",
        "::",
    ]));
    fs::write(dir.join("BOOTX64.EFI"), grub(dir, "x86_64-efi", &[])).unwrap();
    let mut initrd = fs::read(qemu::images(kernel).join("initrd.cpio")).unwrap();
    initrd.extend(cpio::job(&format!("{}{JOB}", qemu::WORDS)));
    fs::write(dir.join("initrd.cpio"), initrd).unwrap();
    run(Command::new("mmd").args(["-i", &place, "::/EFI", "::/EFI/BOOT"]));
    let vmlinuz = qemu::images(kernel).join("vmlinuz");
    for (file, target) in [
        (dir.join("BOOTX64.EFI"), "::/EFI/BOOT/BOOTX64.EFI"),
        (vmlinuz, "::/vmlinuz"),
        (dir.join("initrd.cpio"), "::/initrd.cpio"),
    ] {
        run(Command::new("mcopy").args(["-i", &place]).arg(file).arg(target));
    }
    disk.sync_all().unwrap();
}

fn is_possible() -> bool {
    let programs = ["grub-mkimage", "mformat", "mcopy", "mmd"];
    let missing = programs.iter().find(|program| Command::new(program).arg("--version").output().is_err());
    let files = [BIOS, EFI, OVMF_CODE, OVMF_VARS];
    let missing = missing.or(files.iter().find(|file| !Path::new(file).exists()));
    if let Some(missing) = missing {
        skip("firmware", &format!("{missing} is not installed (make test-deps)"));
    }
    missing.is_none() && can_run(&["6.12"])
}

/// Boots the disk; `firmware` adds its own arguments.
fn boot(kernel: &str, mode: &'static str, board: &str, firmware: impl Fn(&mut Machine, &Path)) -> Heard {
    let dir = images::test_dir();
    let export = Export::new("boot", mode);
    let image = dir.path().join(export.image());
    make_disk(dir.path(), &image, kernel);
    let before = fs::read(&image).unwrap();
    let daemon = Daemon::start(dir.path(), std::slice::from_ref(&export), &[]);
    let mut machine = Machine::new(dir.path(), board);
    firmware(&mut machine, dir.path());
    let heard = machine.disk(&export).start(false).finish();
    daemon.stop();
    assert!(heard.0.contains("GRUB has found the disk"), "{}", heard.0);
    heard.expect_sum("sum", &image, IMAGE_MIB);
    heard.expect("write", "0");
    assert!(
        fs::read(&image).unwrap() == before,
        "{mode}: a zero sector was written with zeroes, and the image differs"
    );
    heard
}

#[test]
fn seabios_and_grub_boot_linux_from_the_disk() {
    if !is_possible() {
        return;
    }
    boot("6.12", "none", "pc", |_, _| ()).expect("efi", "no");
}

fn with_ovmf(machine: &mut Machine, dir: &Path) {
    fs::copy(OVMF_VARS, dir.join("vars.fd")).unwrap();
    let code = format!("if=pflash,format=raw,readonly=on,file={OVMF_CODE}");
    machine.more(&["-drive", &code, "-drive", "if=pflash,format=raw,file=vars.fd"]);
}

#[test]
fn ovmf_and_grub_boot_linux_from_the_disk() {
    if !is_possible() {
        return;
    }
    boot("6.12", "writeback", "q35", with_ovmf).expect("efi", "/sys/firmware/efi");
}

#[test]
fn both_firmwares_boot_from_each_mode() {
    if !is_torture() {
        skip("torture", "firmware from disks in each mode (make torture)");
        return;
    }
    if !is_possible() {
        return;
    }
    for mode in images::modes() {
        boot("6.1", mode, "q35", |_, _| ()).expect("efi", "no");
        boot("6.1", mode, "pc", with_ovmf).expect("efi", "/sys/firmware/efi");
    }
}
