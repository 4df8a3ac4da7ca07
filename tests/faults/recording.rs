//! The history of a disk since power on: its operations, and the promises made between them. Can be cut at
//! any moment and saved as text. Runs nothing itself.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::disk::Device;
use crate::medium::{FileId, FolderId, Image, Medium, Op};

#[derive(Clone, Debug)]
pub(crate) struct Recording {
    start: Image,
    ops: Vec<Op>,
    /// The promises, each with the count of operations before it.
    notes: Vec<(usize, String)>,
}

impl Recording {
    pub(crate) fn new(start: Image) -> Self {
        Self { start, ops: Vec::new(), notes: Vec::new() }
    }

    pub(crate) fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    pub(crate) fn note(&mut self, text: String) {
        self.notes.push((self.ops.len(), text));
    }

    /// Returns the count of operations. A cut is at a point from 0 (before the first) to this (after the
    /// last).
    pub(crate) fn len(&self) -> usize {
        self.ops.len()
    }

    pub(crate) fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Returns the moments just before and just after each operation that `wanted` selects, in order.
    pub(crate) fn moments(&self, wanted: impl Fn(&Op) -> bool) -> Vec<usize> {
        let picked = self.ops.iter().enumerate().filter(|(_, op)| wanted(op));
        picked.flat_map(|(at, _)| [at, at + 1]).collect()
    }

    /// Returns the promises made before a cut at this point.
    pub(crate) fn notes(&self, point: usize) -> Vec<&str> {
        let before = self.notes.iter().take_while(|(at, _)| *at <= point);
        before.map(|(_, text)| text.as_str()).collect()
    }

    /// Returns what is left if the power fails after the first `point` operations.
    pub(crate) fn cut(&self, point: usize, seed: u64, device: Device) -> Image {
        let mut playback = self.playback();
        playback.advance(point);
        device.cut(playback.medium(), seed)
    }

    pub(crate) fn playback(&self) -> Playback<'_> {
        Playback { recording: self, medium: self.start.medium().clone(), done: 0 }
    }
}

/// A recording, replayed up to some operation.
pub(crate) struct Playback<'a> {
    recording: &'a Recording,
    medium: Medium,
    done: usize,
}

impl Playback<'_> {
    /// Replays up to `point`, which must not be behind.
    pub(crate) fn advance(&mut self, point: usize) {
        assert!(self.done <= point, "a playback only goes forward");
        for op in &self.recording.ops[self.done..point] {
            self.medium.apply(op);
        }
        self.done = point;
    }

    pub(crate) fn medium(&self) -> &Medium {
        &self.medium
    }
}

/// The text has a line for each operation and is readable for people too.
impl Recording {
    pub(crate) fn to_text(&self) -> String {
        let mut text = String::new();
        for op in self.start.history() {
            push_op(&mut text, &op);
        }
        text.push_str("start\n");
        let mut notes = self.notes.iter().peekable();
        for done in 0..=self.ops.len() {
            while let Some((_, note)) = notes.next_if(|(at, _)| *at == done) {
                writeln!(text, "note {}", note.escape_default()).expect("a string is writable");
            }
            if let Some(op) = self.ops.get(done) {
                push_op(&mut text, op);
            }
        }
        text
    }

    /// Returns `None` if the text is not a recording.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let mut history = Vec::new();
        let mut recording: Option<Self> = None;
        for line in text.lines() {
            if line == "start" {
                recording = Some(Self::new(Image::after(&history)));
            } else if let Some(note) = line.strip_prefix("note ") {
                recording.as_mut()?.note(unescape(note)?);
            } else if let Some(recording) = &mut recording {
                recording.push(parse_op(line)?);
            } else {
                history.push(parse_op(line)?);
            }
        }
        recording
    }
}

fn push_op(text: &mut String, op: &Op) {
    match op {
        Op::CreateFile { folder, name, file } => {
            writeln!(text, "file {} {name} {}", folder.0, file.0)
        }
        Op::CreateFolder { folder, name, created } => {
            writeln!(text, "folder {} {name} {}", folder.0, created.0)
        }
        Op::Rename { folder, from, to } => writeln!(text, "rename {} {from} {to}", folder.0),
        Op::Remove { folder, name } => writeln!(text, "remove {} {name}", folder.0),
        Op::SyncFolder { folder } => writeln!(text, "sync-folder {}", folder.0),
        Op::Write { file, offset, bytes } => push_bytes(text, "write", *file, *offset, bytes),
        Op::ChangePage { file, offset, bytes } => push_bytes(text, "page", *file, *offset, bytes),
        Op::SetLength { file, length } => writeln!(text, "length {} {length}", file.0),
        Op::SyncFile { file } => writeln!(text, "sync {}", file.0),
        Op::FailSync { file, seed } => writeln!(text, "fail-sync {} {seed}", file.0),
    }
    .expect("a string is writable");
}

fn push_bytes(
    text: &mut String,
    what: &str,
    file: FileId,
    offset: usize,
    bytes: &[u8],
) -> std::fmt::Result {
    write!(text, "{what} {} {offset} x", file.0)?;
    bytes.iter().try_for_each(|byte| write!(text, "{byte:02x}"))?;
    writeln!(text)
}

fn parse_op(line: &str) -> Option<Op> {
    let words: Vec<&str> = line.split(' ').collect();
    let folder = |word: &str| Some(FolderId(word.parse().ok()?));
    let file = |word: &str| Some(FileId(word.parse().ok()?));
    Some(match words[..] {
        ["file", at, name, id] => {
            Op::CreateFile { folder: folder(at)?, name: name.to_owned(), file: file(id)? }
        }
        ["folder", at, name, id] => {
            Op::CreateFolder { folder: folder(at)?, name: name.to_owned(), created: folder(id)? }
        }
        ["rename", at, from, to] => {
            Op::Rename { folder: folder(at)?, from: from.to_owned(), to: to.to_owned() }
        }
        ["remove", at, name] => Op::Remove { folder: folder(at)?, name: name.to_owned() },
        ["sync-folder", at] => Op::SyncFolder { folder: folder(at)? },
        ["write", id, offset, hex] => Op::Write {
            file: file(id)?,
            offset: offset.parse().ok()?,
            bytes: parse_bytes(hex.strip_prefix('x')?)?,
        },
        ["page", id, offset, hex] => Op::ChangePage {
            file: file(id)?,
            offset: offset.parse().ok()?,
            bytes: parse_bytes(hex.strip_prefix('x')?)?,
        },
        ["length", id, length] => Op::SetLength { file: file(id)?, length: length.parse().ok()? },
        ["sync", id] => Op::SyncFile { file: file(id)? },
        ["fail-sync", id, seed] => Op::FailSync { file: file(id)?, seed: seed.parse().ok()? },
        _ => return None,
    })
}

fn parse_bytes(hex: &str) -> Option<Arc<[u8]>> {
    let pairs = (0..hex.len()).step_by(2);
    pairs.map(|at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()).collect()
}

/// Reverses `escape_default` for notes, which are one line of printable text.
fn unescape(text: &str) -> Option<String> {
    let mut plain = String::new();
    let mut rest = text.chars();
    while let Some(next) = rest.next() {
        plain.push(match next {
            '\\' => match rest.next()? {
                'n' => '\n',
                't' => '\t',
                'r' => '\r',
                'u' => {
                    let digits: String = rest.by_ref().take_while(|next| *next != '}').collect();
                    let digits = digits.strip_prefix('{')?;
                    char::from_u32(u32::from_str_radix(digits, 16).ok()?)?
                }
                other => other,
            },
            other => other,
        });
    }
    Some(plain)
}
