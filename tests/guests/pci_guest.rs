//! PCI under stock kernels: functions that are removed, found again and moved, with and without I/O, and
//! the ways to reset and to do without ACPI.
//!
//! Runs on this machine's KVM where it can run Linux, in the emulated host elsewhere.

use minivmm_testkit::cpio;
use minivmm_testkit::host::{Host, Outcome, Place};

/// Boots a kernel with a 6.12 guest's programs (or its own), and a job that ends with power-off.
fn boot(place: &Place, kernel: &str, args: &str, job: &str) -> Outcome {
    place.put("job.cpio", &cpio::job(job));
    let (image, programs) = match kernel {
        // Unpacked, because an emulated CPU takes longer to unpack a kernel than to boot it.
        "small" => ("small/vmlinux", "6.12"),
        stock => (&*format!("{stock}/vmlinux"), stock),
    };
    let command = format!(
        "cat $GUESTS/{programs}/initrd.cpio job.cpio > initrd.cpio\n\
         minivmm --timeout 500 --kernel $GUESTS/{image} --initrd initrd.cpio --append quiet {args}"
    );
    place.sh(&command)
}

/// The value of a line "T NAME VALUE" that a job has printed.
fn told<'a>(outcome: &'a Outcome, name: &str) -> &'a str {
    let mut lines = outcome.stdout.lines().map(str::trim);
    let value = lines.find_map(|line| line.strip_prefix("T ")?.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("the guest did not tell {name}: {outcome:#?}")).trim()
}

/// Linux gives a function that it finds anew the first free address, which is not the one that it had. The
/// disk works there as before, its doorbells are KVM's again, and a neighbour at work does not notice.
fn a_function_is_removed_and_found_again(kernel: &str) {
    const WRITES: u64 = 400;
    let place = Host::get().place();
    place.sh("truncate -s 16M a.img b.img");
    let job = format!(
        r#"
tell() {{ echo "T $*"; }}
wait_for() {{ n=0; while [ ! -b $1 ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done; }}
disk() {{ basename $(dirname $(readlink -f /sys/block/$1/device)); }}
where() {{ head -n 1 /sys/bus/pci/devices/$1/resource | cut -d' ' -f1; }}
head -c 1048576 /dev/urandom > /tmp/data
dd if=/tmp/data of=/dev/vda bs=64k oflag=direct 2>/dev/null; tell before $?
(while [ ! -e /tmp/stop ]; do dd if=/tmp/data of=/dev/vdb bs=64k oflag=direct 2>/dev/null || touch /tmp/broken; sleep 0.1; done
 touch /tmp/stopped) &
f=$(disk vda); tell first $(where $f)
for round in 1 2; do
  if [ $round -gt 1 ]; then
    (while dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null; do :; done; touch /tmp/ended$round) &
    sleep 0.3
  fi
  echo 1 > /sys/bus/pci/devices/$f/remove
  [ $round = 1 ] || while [ ! -e /tmp/ended$round ]; do sleep 0.1; done
  tell gone $round $([ -e /sys/block/vda ]; echo $?)
  echo 1 > /sys/bus/pci/rescan
  wait_for /dev/vda
  tell at $round $(where $f)
  cat /sys/bus/pci/devices/$f/enable > /tmp/enabled; tell enabled $round $(cat /tmp/enabled)
  dd if=/dev/vda of=/tmp/read bs=64k count=16 iflag=direct 2>/dev/null
  cmp /tmp/data /tmp/read; tell same $round $?
done
touch /tmp/stop; while [ ! -e /tmp/stopped ]; do sleep 0.1; done
tell broken $([ -e /tmp/broken ]; echo $?)
dd if=/dev/vdb of=/tmp/read bs=64k count=16 iflag=direct 2>/dev/null; cmp /tmp/data /tmp/read; tell neighbour $?
dd if=/dev/zero of=/dev/vda bs=4k count={WRITES} oflag=direct 2>/dev/null; tell after $?
dmesg | grep -iE "bug:|hung|failed to assign|can't assign|virtio.*(fail|error)" | sed 's/^/K /'
"#
    );
    let args = "--transport pci --stats=stats.json --disk a.img,cache=none --disk b.img,cache=none";
    let outcome = boot(&place, kernel, args, &job);
    assert_eq!(outcome.status, 0, "{kernel}: {outcome:#?}");
    let told = |name: &str| told(&outcome, name);
    assert_eq!((told("before"), told("after"), told("neighbour"), told("broken")), ("0", "0", "0", "1"));
    assert_eq!(told("first"), "0x00000000d1008000", "where it was placed");
    for round in 1..=2 {
        assert_eq!(told(&format!("gone {round}")), "1", "{outcome:#?}");
        assert_eq!(told(&format!("enabled {round}")), "1", "{outcome:#?}");
        assert_eq!(told(&format!("same {round}")), "0", "{outcome:#?}");
    }
    assert_eq!(told("at 1"), "0x00000000d1000000", "the first free address: {outcome:#?}");
    assert!(!outcome.stdout.lines().any(|line| line.trim().starts_with("K ")), "{outcome:#?}");
    let json: serde_json::Value = serde_json::from_str(&place.sh("cat stats.json").stdout).unwrap();
    let writes = json["exits"]["mmio_write"].as_u64().unwrap();
    let requests = json["disks"][1]["requests"]["write"].as_u64().unwrap();
    println!("{kernel}: {writes} writes of registers, {requests} requests of the neighbour");
    assert!(requests > 0);
    // Bring-up, four times, is a few hundred accesses; a doorbell that is not bound is one a request.
    let read = json["disks"][0]["requests"]["read"].as_u64().unwrap();
    assert!(read + requests + WRITES > 2 * writes, "doorbells come out of KVM: {json}");
}

#[test]
fn a_function_is_removed_and_found_again_on_6_12() {
    a_function_is_removed_and_found_again("6.12");
}

#[test]
fn a_function_is_removed_and_found_again_on_6_1() {
    a_function_is_removed_and_found_again("6.1");
}

#[test]
fn a_function_is_removed_and_found_again_on_a_small_kernel() {
    a_function_is_removed_and_found_again("small");
}

/// Port 0xCF9 (Linux: `reboot=pci`) is a reset like any other, whichever transport there is. A kernel whose
/// first way of rebooting does nothing would end in a triple fault, which is a failure.
#[test]
fn a_reboot_by_the_reset_control_register_is_a_reset() {
    let place = Host::get().place();
    place.sh("truncate -s 1M a.img");
    for transport in ["pci", "mmio"] {
        let args = format!("--append 'reboot=pci minivmm.end=reboot' --transport {transport} --disk a.img");
        let outcome = boot(&place, "small", &args, "echo T ran yes");
        assert_eq!((outcome.status, told(&outcome, "ran")), (0, "yes"), "{transport}: {outcome:#?}");
        assert!(!outcome.stderr.contains("triple fault"), "{transport}: {outcome:#?}");
    }
}

/// What a parameter costs is said before the guest begins, on the transport where it costs something.
#[test]
fn a_parameter_that_takes_the_disks_away_is_warned_of() {
    let place = Host::get().place();
    place.sh("truncate -s 1M a.img");
    for (parameter, transport, warned) in [
        ("pci=nomsi", "pci", true),
        ("nolapic", "pci", true),
        ("acpi=off", "mmio", true),
        ("acpi=off", "pci", true),
        ("acpi=noirq", "mmio", true),
        ("noapic", "mmio", true),
        ("nosmp", "pci", true),
        ("quiet", "pci", false),
    ] {
        // The guest need not run for that.
        let outcome = place.sh(&format!(
            "minivmm --timeout 1 --kernel $GUESTS/small/bzImage --initrd none --transport {transport} \
             --append {parameter} --disk a.img"
        ));
        let said = outcome.stderr.contains(&format!("the kernel's parameter {parameter}:"));
        assert_eq!(said, warned, "{parameter} on {transport}: {outcome:#?}");
    }
}
