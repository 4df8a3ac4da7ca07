//! `tombola`: the arguments, and what becomes of them.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use tombola::commands::Arguments;

fn main() -> ExitCode {
    match Arguments::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}
