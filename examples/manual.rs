//! Writes the manual page and the shells' completions into a directory, from the very definitions
//! that parse the command line. `make install` and `make deb` run it; nothing of it is installed.

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_complete::generate_to;
use clap_mangen::Man;
use minivmm::cli::Args;

fn main() -> Result<(), Box<dyn Error>> {
    let directory: PathBuf = std::env::args_os().nth(1).ok_or("usage: manual DIRECTORY")?.into();
    fs::create_dir_all(&directory)?;
    let command = Args::command();
    write_page(&directory, command.clone())?;
    for sub in command.get_subcommands() {
        let name: &'static str = format!("{}-{}", command.get_name(), sub.get_name()).leak();
        let version: &'static str = command.get_version().unwrap_or_default().to_owned().leak();
        write_page(&directory, sub.clone().name(name).bin_name(name.replacen('-', " ", 1)).version(version))?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command.clone(), "minivmm", &directory)?;
    }
    Ok(())
}

fn write_page(directory: &std::path::Path, command: Command) -> Result<(), Box<dyn Error>> {
    let file = directory.join(format!("{}.1", command.get_name()));
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    fs::write(file, page)?;
    Ok(())
}
