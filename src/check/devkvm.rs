//! Checks /dev/kvm: does it exist, may this user open it, is it KVM, and does it have what minivmm needs?
//!
//! Owns the rows about it and, if it cannot be used, the one thing to do first.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use kvm_ioctls::Kvm;

use super::{EMULATED_HOST, Row, Status};
use crate::kvm::{self, KvmError, failure};

const PATH: &str = "/dev/kvm";

/// Why KVM cannot be used here, and what the user can do.
pub struct Cause {
    /// The cause in a sentence.
    pub what: String,
    /// What the user can do about it.
    pub remedy: String,
}

/// Adds the rows. The first obstacle is returned as the cause.
pub fn look(rows: &mut Vec<Row>) -> Result<Kvm, Cause> {
    let mut row = |key: &str, status, found: String| rows.push(Row::new("kvm", key, status, found));
    row("processor", Status::Note, processor());
    let kvm = match kvm::open_device() {
        Ok(kvm) => kvm,
        Err(error) => {
            let (found, cause) = cannot_open(&error);
            row("/dev/kvm", Status::Fail, found);
            return Err(cause);
        }
    };
    row("/dev/kvm", Status::Pass, format!("may be read and written ({})", owner()));
    match kvm::version(&kvm) {
        Ok(version) => row("interface version", Status::Pass, version.to_string()),
        Err(KvmError::Version(-1)) => {
            row("interface version", Status::Fail, "none: this is not KVM".into());
            return Err(not_kvm());
        }
        Err(error) => {
            row("interface version", Status::Fail, error.to_string());
            return Err(newer_kernel(error.to_string()));
        }
    }
    let mut missing = Vec::new();
    for (name, there) in kvm::extensions(&kvm) {
        let (status, found) = if there { (Status::Pass, "there") } else { (Status::Fail, "missing") };
        row(name, status, found.into());
        if !there {
            missing.push(name);
        }
    }
    row("CPUs of a guest", Status::Note, format!("{} at most", kvm.get_max_vcpus()));
    if !missing.is_empty() {
        return Err(newer_kernel(format!("this KVM has no {}", missing.join(", "))));
    }
    match kvm::empty_vm(&kvm) {
        Ok(_) => row("virtual machine", Status::Pass, "can be created".into()),
        Err(error) => {
            let (found, cause) = cannot_create(&error);
            row("virtual machine", Status::Fail, found);
            return Err(cause);
        }
    }
    Ok(kvm)
}

/// Returns the finding and the cause if KVM_CREATE_VM fails.
fn cannot_create(error: &KvmError) -> (String, Cause) {
    let answer = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let found = format!("cannot be created: {answer}");
    let cause = match error {
        KvmError::Busy(_) => another_hypervisor(),
        _ => Cause {
            what: format!("KVM cannot create a virtual machine: {answer}"),
            remedy: format!("dmesg of this machine may tell why; or {EMULATED_HOST}"),
        },
    };
    (found, cause)
}

fn another_hypervisor() -> Cause {
    Cause { what: kvm::ANOTHER_HYPERVISOR.into(), remedy: format!("{}; or {EMULATED_HOST}", kvm::STOP_IT) }
}

fn processor() -> String {
    let inside = if is_guest() { "; this machine is a virtual one itself" } else { "" };
    match failure::hardware() {
        Some(name) => format!("hardware virtualization: {name}{inside}"),
        None => format!("no hardware virtualization: neither vmx nor svm in /proc/cpuinfo{inside}"),
    }
}

fn is_guest() -> bool {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines().any(|line| line.starts_with("flags") && line.split(' ').any(|flag| flag == "hypervisor"))
}

/// Returns owner, group and mode, as `ls` shows them.
fn owner() -> String {
    match fs::metadata(PATH) {
        Ok(found) => {
            let name = |file, id| name_of(file, id).unwrap_or_else(|| id.to_string());
            let (user, group) = (name("/etc/passwd", found.uid()), name("/etc/group", found.gid()));
            format!("owner {user}:{group}, mode {:04o}", found.mode() & 0o7777)
        }
        Err(error) => error.to_string(),
    }
}

/// Returns the name of a user or group from the plain file, because a static binary cannot use name services.
fn name_of(file: &str, id: u32) -> Option<String> {
    let content = fs::read_to_string(file).ok()?;
    let line = content.lines().find(|line| line.split(':').nth(2) == Some(id.to_string().as_str()))?;
    line.split(':').next().map(str::to_owned)
}

/// Returns the finding and the cause if /dev/kvm cannot be opened.
fn cannot_open(error: &io::Error) -> (String, Cause) {
    let cause = |what: &str, remedy: String| Cause { what: what.into(), remedy };
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            let found = format!("no permission ({}; you are {})", owner(), myself());
            (found, cause("no permission for /dev/kvm", permission_remedy()))
        }
        Some(libc::ENOENT) => ("not there".into(), cause("this machine has no /dev/kvm", missing_remedy())),
        Some(libc::ENODEV | libc::ENXIO) => {
            let what = "/dev/kvm is there, but no KVM stands behind it";
            (error.to_string(), cause(what, missing_remedy()))
        }
        Some(libc::EBUSY) => (error.to_string(), another_hypervisor()),
        _ if fs::metadata(PATH).is_ok_and(|found| !found.file_type().is_char_device()) => {
            ("it is no device".into(), not_kvm())
        }
        _ => (error.to_string(), cause("/dev/kvm does not open", EMULATED_HOST.into())),
    }
}

fn not_kvm() -> Cause {
    let remedy = format!(
        "something else lies at /dev/kvm: `sudo rm /dev/kvm && sudo modprobe kvm_intel` (or kvm_amd) brings the \
         device back, in a container `--device /dev/kvm`; or {EMULATED_HOST}"
    );
    Cause { what: "/dev/kvm is not KVM".into(), remedy }
}

fn newer_kernel(what: String) -> Cause {
    Cause { what, remedy: format!("use a newer kernel on this machine; or {EMULATED_HOST}") }
}

fn myself() -> String {
    // SAFETY: the call takes nothing, touches no memory, and cannot fail.
    let id = unsafe { libc::geteuid() };
    match name_of("/etc/passwd", id) {
        Some(name) => format!("{name}, uid {id}"),
        None => format!("uid {id}"),
    }
}

fn permission_remedy() -> String {
    // SAFETY: as in `myself`.
    if unsafe { libc::geteuid() } == 0 {
        return "root is refused too: a container must be given the device (docker run --device /dev/kvm)"
            .into();
    }
    let group = fs::metadata(PATH).ok().and_then(|found| {
        let group_may = found.mode() & 0o060 == 0o060 && found.gid() != 0;
        name_of("/etc/group", found.gid()).filter(|_| group_may)
    });
    match group {
        Some(group) => format!(
            "join the group {group}: `sudo usermod -aG {group} $USER`, then log in anew (or `newgrp {group}` in this \
             shell); until then, {EMULATED_HOST}"
        ),
        None => format!(
            "no group may use it: `sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm`, and `sudo usermod -aG kvm \
             $USER`; until then, {EMULATED_HOST}"
        ),
    }
}

fn missing_remedy() -> String {
    match failure::hardware() {
        Some(name) => {
            let module = if name == "vmx" { "kvm_intel" } else { "kvm_amd" };
            format!(
                "`sudo modprobe {module}` (dmesg tells why, should it refuse); in a container, give it the device \
                 (--device /dev/kvm); or {EMULATED_HOST}"
            )
        }
        None if is_guest() => {
            format!(
                "switch nested virtualization on for this VM, where its provider lets you; or {EMULATED_HOST}"
            )
        }
        None => format!("switch VMX or SVM on in the firmware's set-up; or {EMULATED_HOST}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_cannot_be_created_has_its_cause_named() {
        let busy = kvm_ioctls::Error::new(libc::EBUSY);
        let (found, cause) = cannot_create(&KvmError::Busy(busy));
        assert!(found.contains("os error 16"), "{found}");
        assert!(cause.what.contains("VirtualBox") && !cause.what.contains("emulates"), "{}", cause.what);
        assert!(cause.remedy.contains("vboxdrv"), "{}", cause.remedy);
        let other = KvmError::Refused("a virtual machine", kvm_ioctls::Error::new(libc::ENOMEM));
        let (_, cause) = cannot_create(&other);
        assert!(cause.what.contains("os error 12") && cause.remedy.contains("dmesg"), "{}", cause.what);
    }
}
