//! `tombola`: the arguments, and what becomes of them.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use tombola::commands::{Arguments, Exit};

fn main() -> ExitCode {
    match Arguments::parse().run() {
        Ok(()) => Exit::Done.into(),
        Err(error) => {
            eprintln!("Error: {error}");
            Exit::of(&error).into()
        }
    }
}
