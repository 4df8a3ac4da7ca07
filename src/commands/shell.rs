//! `tombola completions` and `tombola man`: generate completion scripts and manual pages from the arguments.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::CommandFactory;
use clap_complete::Shell;

use super::Arguments;

#[derive(Debug, clap::Args)]
pub(super) struct CompletionFlags {
    /// The shell
    shell: Shell,
}

#[derive(Debug, clap::Args)]
pub(super) struct ManFlags {
    /// Write a page for each command into this folder, instead of one page to standard output
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(super) fn completions(flags: &CompletionFlags) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut Arguments::command(), "tombola", &mut script);
    print(&script)
}

pub(super) fn man(flags: &ManFlags) -> anyhow::Result<()> {
    let command = Arguments::command();
    match &flags.dir {
        None => print(&page(command)?),
        Some(dir) => write_pages(command, dir)
            .map_err(|error| anyhow!("can't write into {}: {error}", dir.display())),
    }
}

fn page(command: clap::Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(page)
}

/// `tombola.1`, `tombola-serve.1` and so on, down to the last subcommand.
fn write_pages(command: clap::Command, dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    clap_mangen::generate_to(command, dir)
}

fn print(text: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text).and_then(|()| out.flush()).map_err(|error| anyhow!("can't print: {error}"))
}
