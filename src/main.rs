//! `tombola`: parses the arguments, runs the command, and prints its error.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use tombola::{Arguments, Exit};

fn main() -> ExitCode {
    match Arguments::parse().run() {
        Ok(()) => Exit::Done.into(),
        Err(error) => {
            eprintln!("Error: {error}");
            Exit::of(&error).into()
        }
    }
}
