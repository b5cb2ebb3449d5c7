//! `minivmm ... -- COMMAND` with kernels: streams, statuses, arguments, files, and every other end.
//!
//! Runs on this machine's KVM where it can run Linux, in the emulated host elsewhere.

use minivmm_testkit::host::{Host, Outcome, Place};
use minivmm_testkit::session::Session;

/// Sets `vm`: minivmm with a guest of this kernel, found as the bundled guest is.
fn vm(kernel: &str) -> String {
    format!(
        "export MINIVMM_GUEST=$GUESTS/{kernel}
         vm() {{ minivmm --timeout 200 --status-file status.json \"$@\"; }}\n"
    )
}

fn run(kernel: &str, script: &str) -> (Place, Outcome) {
    let place = Host::get().place();
    let outcome = place.sh(&(vm(kernel) + script));
    (place, outcome)
}

/// A word of the status file, as its line has it.
fn told(place: &Place, field: &str) -> String {
    let text = place.sh("cat status.json").stdout;
    let line =
        text.lines().find_map(|line| line.trim().strip_prefix(&format!("\"{field}\": ")).map(str::to_owned));
    let line = line.unwrap_or_else(|| panic!("no {field} in {text:?}"));
    line.trim_end_matches(',').trim_matches('"').to_owned()
}

fn ten_mebibytes_out_and_in(kernel: &str) {
    let (place, outcome) = run(
        kernel,
        "head -c 10485760 /dev/urandom > bytes
         vm -- sh -c 'tee /tmp/bytes | sha256sum >&2; cat /tmp/bytes' < bytes > back 2> sum || exit
         cmp bytes back && sha256sum < bytes | cmp - sum && echo equal",
    );
    assert_eq!((outcome.status, outcome.stdout.as_str()), (0, "equal\n"), "{outcome:#?}");
    assert_eq!(told(&place, "cause"), "command-exited");
    let boot: f64 = told(&place, "boot").parse().unwrap();
    let command: f64 = told(&place, "command").parse().unwrap_or(0.0);
    assert!(boot > 0.0 && command >= 0.0);
}

#[test]
fn ten_mebibytes_go_out_and_in_on_6_12() {
    ten_mebibytes_out_and_in("6.12");
}

#[test]
fn ten_mebibytes_go_out_and_in_on_6_1_where_the_console_is_a_module() {
    ten_mebibytes_out_and_in("6.1");
}

#[test]
fn the_commands_status_is_minivmms() {
    for (kernel, command, status, cause, word) in [
        ("6.12", "sh -c 'echo out; echo err >&2; exit 1'", 1, "command-exited", "err"),
        ("6.1", "sh -c 'echo out; exit 123'", 123, "command-exited", ""),
        ("6.12", "sh -c 'echo out; exit 125'", 123, "command-exited", "exited with status 125"),
        ("6.12", "sh -c 'echo out; kill -KILL $$'", 137, "command-killed", "SIGKILL"),
        ("6.12", "no-such-command", 127, "command-not-found", "the guest has no command no-such-command"),
        ("6.12", "/etc/passwd", 127, "command-not-started", "Permission denied"),
        ("6.12", "poweroff -f", 125, "no-report", "without reporting how poweroff ended"),
        ("6.12", "sh -c 'echo out; sleep 1; echo c > /proc/sysrq-trigger'", 124, "guest-panic", "panicked"),
    ] {
        let (place, outcome) = run(kernel, &format!("vm -- {command}"));
        assert_eq!(outcome.status, status, "{command}: {outcome:#?}");
        let out = if command.contains("echo out") { "out\n" } else { "" };
        assert_eq!(outcome.stdout, out, "{command}");
        assert!(outcome.stderr.contains(word), "{command}: {}", outcome.stderr);
        assert_eq!((told(&place, "cause"), told(&place, "exit_status")), (cause.into(), status.to_string()));
        // Of the kernel's nothing is told unless it is why the guest has ended; then all of it.
        if cause == "guest-panic" {
            let first = outcome.stderr.find("sysrq triggered crash");
            let call_trace = outcome.stderr.find("Call Trace");
            assert!(first.is_some() && first < call_trace, "{command}: {}", outcome.stderr);
            assert!(
                outcome.stderr.trim_end().ends_with("the guest's kernel has panicked"),
                "{}",
                outcome.stderr
            );
            let kept = place.sh("grep -c 'sysrq triggered crash' status.json").stdout;
            assert_eq!(kept, "1\n", "{command}");
        } else if cause != "no-report" {
            assert!(outcome.stderr.lines().count() <= 1, "{command}: {}", outcome.stderr);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_a_figure_with_which_it_comes_whole() {
    // The figure of a refusal, and the same with it.
    let script = "
        twice() {
            vm --memory \"$@\" > out 2> words; echo \"$?\"
            needed=$(sed -n 's/.*needs --memory \\([0-9]*M\\),.*/\\1/p' words); shift
            vm --memory \"$needed\" \"$@\"
        }
        head -c 41943040 /dev/urandom > big\n";
    for (command, output) in
        [("twice 48M -- echo hi", "hi\n"), ("twice 160M --add big:/big -- wc -c /big", "41943040 /big\n")]
    {
        for kernel in ["6.12", "6.1"] {
            let (_, outcome) = run(kernel, &format!("{script}{command}"));
            assert_eq!(outcome.stdout, format!("125\n{output}"), "{command}, {kernel}: {outcome:#?}");
        }
    }
}

#[test]
fn a_guest_that_could_not_unpack_its_files_says_so_and_runs_nothing() {
    // What 256M have room for, and 192M have not: the kernel is told to leave 64 MiB alone.
    let script = r"size=$((64000000 - $(stat -c %s $MINIVMM_GUEST/initrd.cpio)))
        head -c $size /dev/urandom > big
        vm --memory 256M --append 'memmap=64M$96M' --add big:/opt/big -- echo hi";
    let (place, outcome) = run("6.12", script);
    assert_eq!((outcome.status, outcome.stdout.as_str()), (125, ""), "{outcome:#?}");
    assert_eq!(told(&place, "cause"), "incomplete");
    for words in
        ["2 of the 7 files", "give it more --memory", "Initramfs unpacking failed", "/job/end is missing"]
    {
        assert!(outcome.stderr.contains(words), "no {words:?} in {}", outcome.stderr);
    }
}

#[test]
fn an_init_that_never_reports_is_ended_with_what_it_has_printed() {
    let script = "printf '#!/bin/sh\\necho a foreign init; exec sleep 1000\\n' > init && chmod +x init
        vm --boot-timeout 40 --add init:/init -- echo hi";
    let (place, outcome) = run("6.12", script);
    assert_eq!((outcome.status, outcome.stdout.as_str()), (125, ""), "{outcome:#?}");
    assert_eq!(told(&place, "cause"), "boot-timeout");
    assert!(outcome.stderr.contains("  a foreign init\n"), "{outcome:#?}");
    // One that has reported has all the time of the world.
    let (_, outcome) = run("6.12", "vm --boot-timeout 40 -- sh -c 'sleep 45; echo done'");
    assert_eq!((outcome.status, outcome.stdout.as_str()), (0, "done\n"), "{outcome:#?}");
}

#[test]
fn a_guest_that_does_not_switch_itself_off_is_ended_with_its_commands_status() {
    let (place, outcome) = run("6.12", "vm --append minivmm.end=halt -- sh -c 'echo done; exit 7'");
    assert_eq!((outcome.status, outcome.stdout.as_str()), (7, "done\n"), "{outcome:#?}");
    assert_eq!(told(&place, "cause"), "command-exited");
    assert!(outcome.stderr.contains("switched itself off"), "{outcome:#?}");
}

#[test]
fn arguments_environment_directory_and_files_arrive_as_they_were() {
    let script = r#"
mkdir -p tree/sub && echo content > tree/sub/file && chmod 640 tree/sub/file && ln -s sub/file tree/link
big=$(head -c 65536 /dev/zero | tr '\0' x)
odd="it's \"quoted\" \$HOME \\n
and on a second line; ünïcödé "
vm --add tree:/tmp/ --add "$(command -v minivmm):/opt/minivmm" --env 'SPACES=a b "c"' --env EMPTY= \
   --workdir /tmp/tree -v -- sh -c '
        pwd; echo "$#"; printf %s "$1" | wc -c; printf "%s|" "$2"; echo; printf "[%s]" "$3" "$4"; echo
        echo "$SPACES|${EMPTY-unset}|${EMPTY:-set}"
        cat link; stat -c %a sub/file; readlink link; ls -d /tmp/tree
        /opt/minivmm --version' name "$big" "$odd" "" last 2> messages
status=$?
grep -c 'Linux version' messages
printf '%s|' "$odd"
exit $status"#;
    let (_, outcome) = run("6.12", script);
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    let odd = "it's \"quoted\" $HOME \\n\nand on a second line; ünïcödé |";
    let version = concat!("minivmm ", env!("CARGO_PKG_VERSION"));
    let expected = format!(
        "/tmp/tree\n4\n65536\n{odd}\n[][last]\na b \"c\"||set\ncontent\n640\nsub/file\n/tmp/tree\n{version}\n1\n{odd}"
    );
    assert_eq!(outcome.stdout, expected);
}

#[test]
fn a_command_that_closes_its_input_or_leaves_something_behind_ends_all_the_same() {
    let script = "yes | vm -- sh -c 'head -n 2; exec <&-; echo more; yes >&2 & exit 4' 2> /dev/null";
    let (_, outcome) = run("6.12", script);
    assert_eq!((outcome.status, outcome.stdout.as_str()), (4, "y\ny\nmore\n"), "{outcome:#?}");
}

#[test]
fn a_slow_reader_gets_everything_and_one_that_goes_away_is_a_broken_pipe() {
    let script =
        "{ vm -- sh -c 'head -c 9000000 /dev/zero; exit 5'; echo $? > status; } | { sleep 9; wc -c; }
         cat status
         { vm -- yes; echo $? > status; } 2> words | head -n 2
         cat status words";
    let (_, outcome) = run("6.12", script);
    let expected = "9000000\n5\ny\ny\n141\nminivmm: yes was killed by signal 13 (SIGPIPE)\n";
    assert_eq!(outcome.stdout, expected, "{outcome:#?}");
}

#[test]
fn the_timeout_and_a_signal_end_a_command_whose_reader_has_stopped_reading() {
    // The reader reads nothing until the other end is done, however long this host takes for it.
    let script =
        "{ minivmm --timeout 20 --status-file status.json -- cat /dev/zero; echo $? > status; } 2> words |
         { until [ -s status ]; do sleep 1; done; }
         cat status words; grep cause status.json";
    let (_, outcome) = run("6.12", script);
    assert!(outcome.stdout.starts_with("126\n") && outcome.stdout.contains("\"timeout\""), "{outcome:#?}");
    assert!(outcome.stdout.contains("--timeout has passed"), "{outcome:#?}");

    let script = "mkfifo pipe; sleep 60 < pipe & reader=$!
         minivmm -- sh -c 'echo ready >&2; cat /dev/zero' > pipe 2> words & vm=$!
         until grep -q ready words || ! kill -0 $vm; do sleep 0.2; done
         sleep 1; kill -INT $vm; wait $vm; status=$?
         kill $reader; cat words; exit $status";
    let (_, outcome) = run("6.12", script);
    assert_eq!(outcome.status, 130, "{outcome:#?}");
    assert!(outcome.stdout.contains("signal 2 has ended the VM"), "{outcome:#?}");
}

#[test]
fn output_that_the_host_cannot_keep_is_a_failure() {
    let (_, outcome) = run("6.12", "vm -- echo lost > /dev/full");
    assert_eq!(outcome.status, 125, "{outcome:#?}");
    assert!(outcome.stderr.contains("No space left on device"), "{outcome:#?}");
}

#[test]
fn control_c_at_a_terminal_ends_the_vm_and_leaves_the_terminal_as_it_was() {
    let place = Host::get().place();
    let script = vm("6.12")
        + r#"before=$(stty -g); trap : INT
             vm -- sh -c 'trap "echo the guest was told" INT; echo ready; read -r line; echo "got:$line"; sleep 1000'
             status=$?; [ "$(stty -g)" = "$before" ] && echo "restored, status:$status""#;
    let mut session = Session::start(&place, &script);
    session.wait_for("ready");
    // The terminal still edits lines: Backspace takes the p away.
    session.type_keys("help\u{7f}lo\n");
    session.wait_for("got:hello");
    session.type_keys("\u{3}");
    session.wait_for("restored, status:130");
    assert!(session.shown.contains("signal 2 has ended the VM"), "{}", session.shown);
    assert!(!session.shown.contains("the guest was told"), "{}", session.shown);
    assert_eq!(session.child.wait().unwrap().code(), Some(0), "{}", session.shown);
    assert_eq!((told(&place, "cause"), told(&place, "exit_status")), ("signal".into(), "130".into()));
}

#[test]
fn control_d_at_a_terminal_ends_the_input() {
    let place = Host::get().place();
    let script = vm("6.12") + "vm -- sh -c 'echo ready; wc -c'; echo status:$?";
    let mut session = Session::start(&place, &script);
    session.wait_for("ready");
    session.type_keys("four\n\u{4}");
    session.wait_for("status:0");
    assert!(session.shown.contains("\n5\r\n"), "{:?}", session.shown);
}
