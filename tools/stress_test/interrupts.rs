//! Being asked to end: Ctrl-C, and on Unix a polite `kill` too, since both must save `--seen`.
//! Decides nothing about how the run ends.

use std::io;
use std::pin::pin;

#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The usual exit code of a program that Ctrl-C ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Listens from the moment it is made. The first interrupt is given out; the second one ends the
/// process, whatever it waits for.
pub(crate) struct Interrupts {
    signals: Signals,
    interrupted: bool,
}

impl Interrupts {
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self { signals: Signals::listen()?, interrupted: false })
    }

    /// Waits for the first interrupt. May be called again after it, to listen for the second.
    pub(crate) async fn recv(&mut self) {
        self.signals.recv().await;
        if self.interrupted {
            std::process::exit(EXIT_INTERRUPTED);
        }
        self.interrupted = true;
    }

    /// Waits for work that a first interrupt does not shorten: a console that blocks could hold it
    /// for ever, and then the second one helps.
    pub(crate) async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = self.recv() => {}
            }
        }
    }
}

#[cfg(unix)]
struct Signals {
    ctrl_c: Signal,
    terminate: Signal,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            ctrl_c: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn recv(&mut self) {
        tokio::select! {
            _ = self.ctrl_c.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(windows)]
struct Signals {
    ctrl_c: tokio::signal::windows::CtrlC,
}

#[cfg(windows)]
impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self { ctrl_c: tokio::signal::windows::ctrl_c()? })
    }

    async fn recv(&mut self) {
        let _ = self.ctrl_c.recv().await;
    }
}
