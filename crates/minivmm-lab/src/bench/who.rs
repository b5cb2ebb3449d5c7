//! Who runs a job: a guest in each mode, and the host, which shows the best that a guest can reach.
//!
//! Owns the choice of what is compared with what. The host runs the same job on the same image. If a mode gives
//! another promise than the job asks for, the host also runs the job with the promise of the mode.

use super::jobs::Job;
use minivmm::disk::cache::CachePolicy;

/// Name of the host's competitor that runs the job unchanged.
pub const HOST: &str = "host";

/// Somebody who runs a job.
#[derive(Debug, Clone)]
pub struct Competitor {
    /// The cache mode; or `host` and the options that differ from the job.
    pub name: String,
    /// Cache mode of the guest's disk; `None` for the host.
    pub mode: Option<&'static CachePolicy>,
    /// The job, with the changes for this competitor.
    pub job: Job,
    /// For a guest, the name of the host's competitor that gives the same promise.
    pub peer: Option<String>,
}

/// Returns everybody who runs `job`: first the guests, then the hosts that they are compared with.
pub fn competitors(job: &Job, modes: &[&'static CachePolicy]) -> Vec<Competitor> {
    let host = |changes: &[(&str, &str)]| Competitor {
        name: host_name(changes),
        mode: None,
        job: job.with(changes),
        peer: None,
    };
    let mut hosts = vec![host(&[])];
    let mut all = Vec::new();
    for &mode in modes {
        let changes = changes(job, mode);
        let peer = host_name(&changes);
        if !hosts.iter().any(|host| host.name == peer) {
            hosts.push(host(&changes));
        }
        all.push(Competitor { name: mode.name.into(), mode: Some(mode), job: job.clone(), peer: Some(peer) });
    }
    all.extend(hosts);
    all
}

/// Returns how the host's job must change to use the caches of the mode and give its promise.
fn changes(job: &Job, mode: &CachePolicy) -> Vec<(&'static str, &'static str)> {
    let mut changes = Vec::new();
    if job.is_direct() && !mode.direct && !mode.drop_behind {
        // The mode keeps data in the host's page cache.
        changes.push(("direct", "0"));
    }
    if job.writes() && !job.syncs() && !mode.write_cache {
        // In this mode each write is stable when it completes.
        changes.push(("sync", "dsync"));
    }
    changes
}

fn host_name(changes: &[(&str, &str)]) -> String {
    let changes = changes.iter().map(|(name, value)| format!(" {name}={value}"));
    std::iter::once(HOST.to_owned()).chain(changes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::jobs;

    #[test]
    fn each_mode_has_a_peer_that_promises_the_same() {
        let modes: Vec<_> = ["none", "writeback", "writethrough", "directsync", "unsafe", "dontcache"]
            .map(|name| CachePolicy::by_name(name).unwrap())
            .into();
        let jobs = jobs::read(None, &[]).unwrap();
        let peers = |job: &str| {
            let job = jobs.iter().find(|it| it.name == job).unwrap();
            let all = competitors(job, &modes);
            let peers: Vec<_> = all.iter().filter_map(|it| it.peer.clone()).collect();
            let hosts: Vec<_> = all.iter().filter(|it| it.mode.is_none()).map(|it| it.name.clone()).collect();
            (peers.join(", "), hosts.join(", "))
        };
        let cached = "host, host direct=0, host direct=0, host, host direct=0, host".to_owned();
        assert_eq!(peers("randread"), (cached.clone(), "host, host direct=0".into()));
        // A job that syncs gives the same promise in every mode but unsafe, for which the host has no
        // equivalent.
        assert_eq!(peers("randwrite-sync"), (cached, "host, host direct=0".into()));
        assert_eq!(
            peers("randwrite"),
            (
                "host, host direct=0, host direct=0 sync=dsync, host sync=dsync, host direct=0, host".into(),
                "host, host direct=0, host direct=0 sync=dsync, host sync=dsync".into()
            )
        );
        let cached_in_the_guest = jobs[0].with(&[("direct", "0")]);
        assert_eq!(competitors(&cached_in_the_guest, &modes).len(), 7);
    }
}
