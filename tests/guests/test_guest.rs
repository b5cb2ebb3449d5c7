//! The bundled test guest with its kernel: its shell at a terminal (size, kind, keys), the kernel's other
//! modules, and a system on a disk that `root=` boots.
//!
//! Runs on this machine's KVM where it can run Linux, in the emulated host elsewhere.

use minivmm_testkit::host::Host;
use minivmm_testkit::session::Session;

#[test]
fn the_shell_at_a_terminal_has_its_size_and_kind_and_follows_it() {
    let place = Host::get().place();
    let script = "stty rows 31 cols 101; before=$(stty -g); terminal=$(tty)
        (until [ -e go ]; do sleep 0.2; done; stty rows 40 cols 132 <$terminal) &
        TERM=xterm-256color MINIVMM_GUEST=$GUESTS/6.12 minivmm --timeout 200
        status=$?; [ \"$(stty -g)\" = \"$before\" ] && echo \"restored, status:$status\"";
    let mut session = Session::start(&place, script);
    session.wait_for("/ # ");
    assert!(session.shown.contains("minivmm test guest"), "{}", session.shown);
    assert!(!session.shown.contains("Linux version"), "a quiet kernel: {}", session.shown);
    session.type_keys("echo size:$(stty size) kind:$TERM tty:$(tty) path:$PATH.\n");
    session.wait_for("size:31 101 kind:xterm-256color tty:/dev/hvc0 path:/usr/local/sbin:");
    place.sh("touch go");
    // A shell that waits for a key knows of the change by SIGWINCH.
    session.type_keys("until [ \"$(stty size)\" = '40 132' ]; do sleep 0.2; done; echo grown:$((6 * 7))\n");
    session.wait_for("grown:42");
    session.type_keys("sleep 1000\n");
    session.type_keys("\u{3}");
    session.type_keys("echo interrupted:$?\n");
    session.wait_for("interrupted:130");
    session.type_keys("exit\n");
    session.wait_for("restored, status:0");
}

#[test]
fn messages_come_with_v_and_a_shell_on_the_serial_port_with_an_init_of_ones_own() {
    let place = Host::get().place();
    let script = "export MINIVMM_GUEST=$GUESTS/6.12
        minivmm -v --timeout 200 --append rdinit=/bin/sh; echo status:$?";
    let mut session = Session::start(&place, script);
    session.wait_for("Linux version 6.12");
    session.wait_for("# ");
    session.type_keys("echo by:$((40 + 2))\n");
    session.wait_for("by:42");
    session.type_keys("\u{1}x");
    session.wait_for("status:0");
}

#[test]
fn the_kernels_other_modules_come_with_an_archive() {
    for kernel in ["6.12", "6.1"] {
        let place = Host::get().place();
        let vm = format!("MINIVMM_GUEST=$GUESTS/{kernel} minivmm --timeout 200");
        let without = place.sh(&format!("{vm} -- modprobe xfs"));
        assert_ne!(without.status, 0, "{without:#?}");
        let with = place.sh(&format!(
            "{vm} --modules -- sh -ec 'modprobe -a xfs btrfs null_blk; ls /sys/module /dev/nullb0; lsblk; \
             strace -c true; command -v mkfs.ext4'"
        ));
        assert_eq!(with.status, 0, "{kernel}: {with:#?}");
        for module in ["\nxfs\n", "\nbtrfs\n", "\nnull_blk\n", "/dev/nullb0", "nullb0 "] {
            assert!(with.stdout.contains(module), "{kernel}: {module} in {}", with.stdout);
        }
    }
    let place = Host::get().place();
    let missing = place.sh("mkdir g; cp $GUESTS/6.12/vmlinuz $GUESTS/6.12/initrd.cpio g; \
         MINIVMM_GUEST=$PWD/g minivmm --modules -- true");
    assert_eq!(missing.status, 125, "{missing:#?}");
    assert!(missing.stderr.contains("modules.cpio") && missing.stderr.contains("make guest"), "{missing:#?}");
}

/// Makes `a.img` an ext4 with the label `sys` that holds the test guest's own programs, and /probe.
const SYSTEM: &str = "truncate -s 200M a.img
    minivmm --timeout 200 --disk a.img -- sh -ec '
        mkfs.ext4 -q -L sys /dev/vda; mount /dev/vda /mnt; cd /mnt
        cp -a /bin /lib /lib64 /usr /sbin /mnt; mkdir dev proc sys run etc tmp; echo ours >etc/mark
        printf \"%s\\n\" \"#!/bin/sh\" \"echo probe:\\$\\$:\\$*: >/dev/console\" \
            \"cat /etc/mark >/dev/console\" \"grep -E \\\" / ext4 r[ow]\\\" /proc/mounts >/dev/console\" \
            \"touch /written 2>/dev/null && echo can-write >/dev/console\" \"sync; poweroff -f\" >probe
        chmod +x probe; cd /; umount /mnt'";

#[test]
fn root_boots_the_system_on_a_disk() {
    let place = Host::get().place();
    let made = place.sh(&format!("export MINIVMM_GUEST=$GUESTS/6.12\n{SYSTEM}"));
    assert_eq!(made.status, 0, "{made:#?}");
    for (line, writable) in [
        ("root=/dev/vda init=/probe", false),
        ("root=LABEL=sys rw rootfstype=ext4 init=/probe -- one two", true),
        ("root=vda rw rootflags=noatime rootwait init=/probe", true),
    ] {
        let run = place.sh(&format!(
            "MINIVMM_GUEST=$GUESTS/6.12 minivmm --timeout 200 --disk a.img --append '{line}' </dev/null"
        ));
        assert_eq!(run.status, 0, "{line}: {run:#?}");
        // It is the first process, and has init's arguments.
        let arguments = if line.contains("--") { "probe:1:one two:" } else { "probe:1::" };
        assert!(run.stdout.contains(arguments), "{line}: {}", run.stdout);
        assert!(run.stdout.contains("ours"), "{line}: {}", run.stdout);
        assert_eq!(run.stdout.contains("can-write"), writable, "{line}: {}", run.stdout);
    }
}

#[test]
fn a_root_that_cannot_be_had_is_a_panic_that_says_why() {
    let place = Host::get().place();
    for (line, why) in [
        ("root=/dev/vdz", "cannot boot root=/dev/vdz: no such device; there are: vda"),
        ("root=/dev/vda", "cannot boot root=/dev/vda: /dev/vda cannot be mounted"),
    ] {
        let run = place.sh(&format!(
            "truncate -s 1M a.img; \
             MINIVMM_GUEST=$GUESTS/6.12 minivmm --timeout 200 --disk a.img --append '{line}' </dev/null"
        ));
        assert_eq!(run.status, 124, "{line}: {run:#?}");
        assert!(run.stdout.contains(why), "{line}: {}", run.stdout);
    }
}
