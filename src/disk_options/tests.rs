//! What `--disk` means, key by key, and what is refused.

use std::path::PathBuf;

use super::*;

#[test]
fn a_path_alone_is_cache_none() {
    let config = DiskConfig::new("a.img");
    assert_eq!(config.cache.name, "none");
    assert_eq!(parse("a.img"), Ok(DiskOptions { config, transport: None, host_cache: HostCache::Keep }));
}

#[test]
fn every_key_is_understood() {
    let text = "a.img,cache=unsafe,readonly,serial=x y,queue-size=64,block-size=4096,discard=off,\
                bounce=always,format=raw,engine=io_uring,stable=group,buffers=fixed,poll-us=7,batch=9,\
                 transport=mmio,queues=16,fault=fail:read:nth=2+seed=3,log-writes=a.log,host-cache=warm,shared-with-host";
    let config = DiskConfig {
        path: "a.img".into(),
        cache: CachePolicy::by_name("unsafe").unwrap(),
        readonly: true,
        serial: Some("x y".into()),
        queue_size: 64,
        queues: Some(16),
        block_size: Some(4096),
        discard: false,
        force_raw: true,
        engine: EngineChoice::Uring,
        stable: StableBy::Group,
        fixed_buffers: true,
        batch: 9,
        poll_us: Some(7),
        bounce_always: true,
        fault: Some("fail:read:nth=2+seed=3".parse().unwrap()),
        log_writes: Some("a.log".into()),
        shared_with_host: true,
        timed: false,
    };
    let expected =
        DiskOptions { config, transport: Some(TransportChoice::Mmio), host_cache: HostCache::Warm };
    assert_eq!(parse(text), Ok(expected));
}

#[test]
fn what_cannot_be_is_refused_and_the_error_names_it() {
    for (text, needle) in [
        ("", "PATH"),
        (",cache=none", "PATH"),
        (
            "a,cache=fast",
            "invalid cache=fast: expected one of none, writethrough, writeback, directsync, unsafe, dontcache",
        ),
        ("a,cache", "invalid cache=: expected one of none"),
        ("a,host-cache=cold", "expected one of keep, drop, warm"),
        ("a,cash=none", "unknown key 'cash'; did you mean 'cache'?"),
        ("a,cache=writebck", "did you mean 'writeback'?"),
        ("a,serial=", "1 to 20 bytes"),
        ("a,queue-size=3", "power of two"),
        ("a,queue-size=2048", "power of two"),
        ("a,queue-size=2", "power of two"),
        ("a,queues=0", "1 to 16"),
        ("a,queues=17", "1 to 16"),
        ("a,queues=auto", "1 to 16"),
        ("a,block-size=1024", "invalid block-size=1024: expected 512 or 4096"),
        ("a,serial=123456789012345678901", "1 to 20 bytes"),
        ("a,readonly=maybe", "expected on or off"),
        ("a,format=qcow2", "invalid format=qcow2: expected raw"),
        ("a,cache=none,cache=none", "twice"),
        ("a,fault=fail:fsync", "invalid fault 'fail:fsync': "),
        ("a,fault=fail:fsync", "read, write, flush, discard"),
        ("a,log-writes", "FILE"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(needle), "{text}: {error}");
    }
}

#[test]
fn how_others_spell_a_key_or_a_value_is_answered_in_our_words() {
    for (part, answer) in [
        ("ro", "unknown key 'ro'; did you mean 'readonly'? (the keys are"),
        ("RO", "; did you mean 'readonly'?"),
        ("read-only=on", "; did you mean 'readonly'?"),
        ("read-only=off", "; did you mean 'readonly=off'?"),
        ("rw", "; did you mean 'readonly=off'?"),
        ("file=b.img", "; the path comes first, without a key"),
        ("if=virtio", "; leave it out: every disk is virtio-blk"),
        ("driver=raw", "; did you mean 'format=raw'?"),
        ("driver=virtio-blk-pci", "; leave it out"),
        ("cache.direct=on", "; did you mean 'cache=none'?"),
        ("cache.no-flush=on", "; did you mean 'cache=unsafe'?"),
        ("cache.no-flush=off", "; leave it out"),
        ("writeback", "; did you mean 'cache=writeback'?"),
        ("aio=native", "; did you mean 'engine=io_uring'?"),
        ("aio=threads", "; did you mean 'engine=sync'?"),
        ("io=native", "; did you mean 'engine=io_uring'?"),
        ("num_queues=2", "; did you mean 'queues'?"),
        ("queue_size=64", "; did you mean 'queue-size'?"),
        ("logical_block_size=4096", "; did you mean 'block-size'?"),
        ("snapshot=on", "; there are no snapshots"),
        ("Cache=none", "; did you mean 'cache'?"),
        ("cache=None", "directsync, unsafe, dontcache; did you mean 'none'?"),
        ("cache=RWF_DONTCACHE", "; did you mean 'dontcache'?"),
        ("dontcache", "; did you mean 'cache=dontcache'?"),
        ("cache=WRITEBACK", "; did you mean 'writeback'?"),
        ("cache=write-back", "; did you mean 'writeback'?"),
        ("cache=off", "; did you mean 'none'?"),
        ("discard=unmap", "invalid discard=unmap: expected on or off; did you mean 'on'?"),
        ("discard=ignore", "; did you mean 'off'?"),
        ("readonly=true", "; did you mean 'on'?"),
        ("engine=native", "; did you mean 'io_uring'?"),
        ("engine=threads", "; did you mean 'sync'?"),
        ("format=QCOW2", "expected raw; `qemu-img convert -O raw` makes"),
        ("transport=virtio-mmio", "; did you mean 'mmio'?"),
    ] {
        let error = parse(format!("a,{part}")).unwrap_err().to_string();
        assert!(error.contains(answer), "{part}: {error}");
        // The suggested spelling is itself understood.
        if let Some(ours) = error.split_once("did you mean '").and_then(|(_, rest)| rest.split_once('\'')) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let is_value = KEYS.iter().any(|it| it.name == key);
            let ours = if is_value { format!("{key}={}", ours.0) } else { ours.0.to_owned() };
            let with_value = parse(format!("a,{ours}={value}"));
            assert!(parse(format!("a,{ours}")).or(with_value).is_ok(), "{part}: {error}");
        }
    }
}

#[test]
fn a_comma_in_the_path_is_written_twice() {
    let options = parse("a,,b.img,readonly").unwrap().config;
    assert_eq!(options.path, PathBuf::from("a,b.img"));
    assert!(options.readonly);
}

#[test]
fn paths_may_be_any_bytes_and_nothing_else_may() {
    let parse = |bytes: &[u8]| parse(OsStr::from_bytes(bytes)).map(|options| options.config);
    let options = parse(b"\xff,,a.img,cache=unsafe,log-writes=l\xfe=,,g").unwrap();
    assert_eq!(options.path.as_os_str().as_bytes(), b"\xff,a.img");
    assert_eq!(options.log_writes.unwrap().as_os_str().as_bytes(), b"l\xfe=,g");
    assert_eq!(options.cache.name, "unsafe");
    for (text, word) in [
        (&b"a,serial=\xff"[..], "invalid serial=\u{fffd}: expected 1 to 20 bytes"),
        (b"a,cache=n\xffne", "did you mean 'none'?"),
        (b"a,c\xffche=none", "unknown key 'c\u{fffd}che'; did you mean 'cache'?"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_file_with_a_comma_in_its_name_is_no_key() {
    let directory = tempfile::tempdir().unwrap();
    let whole = directory.path().join("disk,readonly").display().to_string();
    assert!(parse(&whole).is_ok(), "no such file: it is a key");
    std::fs::write(&whole, "").unwrap();
    let error = parse(&whole).unwrap_err().to_string();
    assert!(error.contains("disk,,readonly") && error.contains("in a path twice"), "{error}");
    assert_eq!(parse(whole.replace(',', ",,")).unwrap().config.path, PathBuf::from(&whole));
    std::fs::write(directory.path().join("disk"), "").unwrap();
    assert!(parse(&whole).unwrap().config.readonly);
}

#[test]
fn help_names_every_key() {
    for key in &KEYS {
        assert!(keys_help().contains(key.name));
    }
}
