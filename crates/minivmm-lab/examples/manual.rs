//! Writes the manual page and the shell completions into a directory, from the definitions that parse the
//! command line. `make install` and `make deb` run it. It is not installed itself.

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use clap::Command;
use clap_complete::Shell;
use clap_complete::generate_to;
use clap_mangen::Man;
use minivmm::disk_options;
use minivmm_export::cli::with_export;
use minivmm_lab::cli;

fn main() -> Result<(), Box<dyn Error>> {
    let directory: PathBuf = std::env::args_os().nth(1).ok_or("usage: manual DIRECTORY")?.into();
    fs::create_dir_all(&directory)?;
    let command = with_export(cli::command());
    // clap adds the command `minivmm help`, which needs no page.
    write_page(&directory, command.clone().disable_help_subcommand(true))?;
    for sub in command.get_subcommands() {
        let name: &'static str = format!("{}-{}", command.get_name(), sub.get_name()).leak();
        let version: &'static str = command.get_version().unwrap_or_default().to_owned().leak();
        write_page(&directory, sub.clone().name(name).bin_name(name.replacen('-', " ", 1)).version(version))?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let path = generate_to(shell, &mut command.clone(), "minivmm", &directory)?;
        let script = fs::read_to_string(&path)?;
        fs::write(path, with_disk_keys(shell, &script))?;
    }
    Ok(())
}

fn write_page(directory: &std::path::Path, command: Command) -> Result<(), Box<dyn Error>> {
    let file = directory.join(format!("{}.1", command.get_name()));
    let synopsis = synopsis(&command);
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    let page = String::from_utf8(page)?;
    // The synopsis of clap_mangen lacks the values of options.
    let (before, after) = page.split_once(".SH SYNOPSIS\n").ok_or("a page without a synopsis")?;
    let rest = after.split_once("\n.SH ").map_or("", |(_, rest)| rest);
    fs::write(file, format!("{before}.SH SYNOPSIS\n{synopsis}\n.SH {rest}"))?;
    Ok(())
}

/// Returns every option with its value, in roff.
fn synopsis(command: &Command) -> String {
    let roff = |text: &str| text.replace('\\', "\\e").replace('-', "\\-");
    let mut line = format!("\\fB{}\\fR", roff(command.get_bin_name().unwrap_or(command.get_name())));
    for option in command.get_arguments().filter(|it| !it.is_hide_set() && !it.is_positional()) {
        let names = [
            option.get_short().map(|short| format!("-{short}")),
            option.get_long().map(|long| format!("--{long}")),
        ];
        let names: Vec<String> =
            names.into_iter().flatten().map(|name| format!("\\fB{}\\fR", roff(&name))).collect();
        let value = match (option.get_action().takes_values(), option.get_value_names()) {
            (true, Some(values)) => {
                let value = format!("\\fI{}\\fR", roff(&values.join(" ")));
                if option.is_require_equals_set() { format!("[={value}]") } else { format!(" {value}") }
            }
            _ => String::new(),
        };
        let one = format!("{}{value}", names.join("|"));
        line += &if option.is_required_set() { format!(" {one}") } else { format!(" [{one}]") };
    }
    for positional in command.get_positionals() {
        let name = positional.get_value_names().map(|names| names.join(" ")).unwrap_or_default();
        let name = format!("\\fI{}\\fR", roff(&name));
        line += &match (positional.is_last_set(), positional.is_required_set()) {
            (true, _) => format!(" [\\-\\- {name}...]"),
            (false, true) => format!(" {name}"),
            (false, false) => format!(" [{name}]"),
        };
    }
    if command.has_subcommands() {
        line += &format!("\n.br\n\\fB{}\\fR \\fICOMMAND\\fR ...", roff(command.get_name()));
    }
    line
}

/// Adds completions that clap cannot describe: keys after a comma in --disk, and values after the `=` of a key.
fn with_disk_keys(shell: Shell, script: &str) -> String {
    let keys: Vec<_> = disk_options::keys().collect();
    let names = || keys.iter().map(|(name, _)| format!("{name}=")).collect::<Vec<_>>().join(" ");
    let cases = |pattern: &dyn Fn(&str, &str) -> String| -> String {
        let lists = keys.iter().filter(|(_, values)| !values.is_empty());
        lists.map(|(name, values)| pattern(name, &values.join(" "))).collect()
    };
    match shell {
        Shell::Bash => format!(
            "{script}
# The keys of --disk. Bash cuts words at '=' and ':', so the whole word is read from the line.
_minivmm_disk() {{
    local line=\"${{COMP_LINE:0:COMP_POINT}}\" word last piece values=
    word=\"${{line##* }}\"
    case \"$line\" in *'--disk '*|*'--disk='*) ;; *) _minivmm \"$@\"; return ;; esac
    case \"${{line% *}} \" in *'--disk ') ;; *) case \"$word\" in --disk=*) ;; *) _minivmm \"$@\"; return ;; esac ;; esac
    word=\"${{word#--disk=}}\"
    case \"$word\" in *,*) ;; *) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- \"$word\")); return ;; esac
    last=\"${{word##*,}}\"
    compopt -o nospace 2>/dev/null
    case \"$last\" in
{}    *=*) COMPREPLY=(); return ;;
    *) piece=\"${{word##*[=:]}}\"; COMPREPLY=($(compgen -P \"${{piece%\"$last\"}}\" -W '{}' -- \"$last\")); return ;;
    esac
    COMPREPLY=($(compgen -W \"$values\" -- \"${{last#*=}}\"))
}}
complete -F _minivmm_disk -o bashdefault -o default minivmm
",
            cases(&|name, values| format!("    {name}=*) values='{values}' ;;\n")),
            names()
        ),
        Shell::Zsh => {
            let function = format!(
                "_minivmm_disk() {{\n    compset -P '*,' || {{ _files; return }}\n    case \"$PREFIX\" in\n{}    *=*) ;;\n    *) \
                 compadd -S '' -- {} ;;\n    esac\n}}\n\n",
                cases(&|name, values| format!("    {name}=*) compset -P '*='; compadd -- {values} ;;\n")),
                names()
            );
            let lines = script.lines().map(|line| match line.contains("--disk=") {
                true => line.replace(":_default'", ":_minivmm_disk'").replace(":_files'", ":_minivmm_disk'"),
                false => line.to_owned(),
            });
            let script = lines.collect::<Vec<_>>().join("\n") + "\n";
            script.replacen("_minivmm() {", &format!("{function}_minivmm() {{"), 1)
        }
        Shell::Fish => {
            let words: Vec<String> = keys
                .iter()
                .flat_map(|(name, values)| match values.is_empty() {
                    true => vec![format!("{name}=")],
                    false => values.iter().map(|value| format!("{name}={value}")).collect(),
                })
                .collect();
            let script = for_fish(script);
            format!(
                "{script}
function __minivmm_disk
    set -l word (commandline -ct | string replace -r -- '^--disk=' '')
    if not string match -q '*,*' -- $word
        __fish_complete_path $word
        return
    end
    set -l before (string replace -r -- '[^,]*$' '' $word)
    for key in {}
        echo $before$key
    end
end
complete -c minivmm -l disk -x -a '(__minivmm_disk)'
",
                words.join(" ")
            )
        }
        _ => script.to_owned(),
    }
}

/// Mends clap's script for fish. It completes no value after a space, because it cannot parse a line that ends
/// with an option without its value. It also takes the word after `--stats` for its file.
fn for_fish(script: &str) -> String {
    let waiting = "    or begin
        set -e cmd[-1]
        argparse -s (__fish_minivmm_global_optspecs) -- $cmd 2>/dev/null
    end
    or return
";
    let command = cli::command();
    let optional = command.get_arguments().filter(|option| option.is_require_equals_set());
    optional
        .filter_map(|option| option.get_long())
        .fold(script.replacen("    or return\n", waiting, 1), |script, name| {
            script.replacen(&format!(" {name}= "), &format!(" '{name}=?' "), 1)
        })
}
