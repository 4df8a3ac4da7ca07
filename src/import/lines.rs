//! Reads numbers or codes, one a line or in a column of a CSV. Knows nothing of the ledger.

use std::fmt;
use std::io::{self, BufRead, Read};
use std::str::FromStr;

use super::strict::{BrokenRecord, Strict};
use crate::space::{Space, Value};

/// The longest line of a text, or cell of a CSV, in bytes. A number has at most 21 characters, and a code at most 64.
const LINE_BYTES_MAX: usize = 1024;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The number of wrong lines that are described. The rest are counted.
const DESCRIBED_MAX: usize = 10;

/// Characters of a line in an error.
const EXCERPT_CHARS: usize = 80;

/// Where the numbers are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    /// The column of a CSV. Without one, each line is a number.
    pub(crate) column: Option<Column>,
    /// A text that may stand in place of a number: a header.
    pub(crate) skip: Option<String>,
    /// The number of lines that were sent before these.
    pub(crate) lines_before: u64,
}

/// A column of a CSV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// The column whose cell in the first line has this text.
    Name(String),
    /// The column at this place, from 1. The CSV has no header, or one that is skipped.
    Place(usize),
}

impl FromStr for Column {
    type Err = &'static str;

    fn from_str(column: &str) -> Result<Self, Self::Err> {
        match column.parse() {
            Ok(0) => Err("columns are counted from 1"),
            Ok(place) => Ok(Self::Place(place)),
            Err(_) if column.is_empty() => Err("a column has a name or a number"),
            Err(_) => Ok(Self::Name(column.to_owned())),
        }
    }
}

/// The reason that lines were refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinesError {
    /// They could not be read.
    #[error("the lines can't be read: {0}")]
    Io(#[from] io::Error),
    /// The first line has no column of this name.
    #[error("the first line has no column {column:?}; it has {found}")]
    NoColumn { column: String, found: String },
    /// Some of them are not numbers of the pool.
    #[error(transparent)]
    Wrong(#[from] WrongLines),
}

/// The lines that are not numbers of the pool.
#[derive(Debug, Default)]
pub(crate) struct WrongLines {
    count: u64,
    /// The numbers and the problems of the first ones.
    first: Vec<(u64, String)>,
}

impl WrongLines {
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds wrong lines of the same file.
    pub(crate) fn add(&mut self, others: Self) {
        self.count += others.count;
        self.first.extend(others.first);
        self.first.sort_unstable();
        self.first.truncate(DESCRIBED_MAX);
    }
}

impl std::error::Error for WrongLines {}

impl fmt::Display for WrongLines {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = if self.count == 1 { "line is" } else { "lines are" };
        write!(formatter, "{} {lines} wrong, so nothing was imported", self.count)?;
        let mut first = self.first.iter();
        first.try_for_each(|(line, problem)| write!(formatter, "\nline {line}: {problem}"))
    }
}

/// Parses what is displayed, as a server responds it. The error is a text that is something else.
impl FromStr for WrongLines {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut lines = text.lines();
        let count = lines.next().and_then(|summary| summary.split(' ').next()?.parse().ok());
        let first = lines.map(|line| {
            let (line, problem) = line.strip_prefix("line ")?.split_once(": ")?;
            Some((line.parse().ok()?, problem.to_owned()))
        });
        let first = first.collect::<Option<_>>();
        count.zip(first).map(|(count, first)| Self { count, first }).ok_or(())
    }
}

/// Reads all lines. Blank ones are allowed. Takes 8 bytes of memory for each number.
///
/// # Errors
/// Returns [`LinesError::Wrong`] if any line has no number of the range, after reading to the end.
pub(crate) fn read(
    from: impl BufRead,
    layout: &Layout,
    space: &Space,
) -> Result<Vec<Value>, LinesError> {
    let mut values = Vec::new();
    read_texts(from, layout, |_, text| match space.parse(text) {
        Ok(value) if space.contains(value) => {
            values.push(value);
            Ok(())
        }
        Ok(_) => Err(format!("{text} is not in the range {space}")),
        Err(error) => Err(error.to_string()),
    })?;
    Ok(values)
}

/// Calls `each` with the text in each line that should be a number, and the number of the line. It returns the
/// problem of a text that is none.
///
/// # Errors
/// Returns [`LinesError::Wrong`] if there was a problem, after reading to the end.
pub(crate) fn read_texts(
    mut from: impl BufRead,
    layout: &Layout,
    each: impl FnMut(u64, &str) -> Result<(), String>,
) -> Result<(), LinesError> {
    let mut start = Vec::new();
    from.by_ref().take(BYTE_ORDER_MARK.len() as u64).read_to_end(&mut start)?;
    let from = start.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&start).chain(from);
    let mut reader = Reader { layout, each, wrong: WrongLines::default() };
    match &layout.column {
        None => reader.read_text(from)?,
        Some(column) => reader.read_csv(from, column)?,
    }
    match reader.wrong.is_empty() {
        true => Ok(()),
        false => Err(reader.wrong.into()),
    }
}

struct Reader<'r, F> {
    layout: &'r Layout,
    each: F,
    wrong: WrongLines,
}

impl<F: FnMut(u64, &str) -> Result<(), String>> Reader<'_, F> {
    fn read_text(&mut self, mut from: impl BufRead) -> Result<(), LinesError> {
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let limit = LINE_BYTES_MAX as u64 + 1;
            if from.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            if line.len() > LINE_BYTES_MAX && line.last() != Some(&b'\n') {
                from.skip_until(b'\n')?;
            }
            self.add(number, &line);
        }
        Ok(())
    }

    fn read_csv(&mut self, from: impl BufRead, column: &Column) -> Result<(), LinesError> {
        // Every record ends with a line feed, from which the number of its line follows. Cells are trimmed, so a
        // carriage return before it does not matter.
        let mut csv = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .terminator(csv::Terminator::Any(b'\n'))
            .from_reader(Strict::new(from).chain(&b"\n"[..]));
        let mut record = csv::ByteRecord::new();
        let place = match column {
            Column::Place(place) => place - 1,
            Column::Name(name) => {
                if !self.read_record(&mut csv, &mut record)? && !self.wrong.is_empty() {
                    return Ok(());
                }
                let is_it = |cell: &[u8]| cell.trim_ascii() == name.as_bytes();
                let cells = || record.iter().map(String::from_utf8_lossy).collect::<Vec<_>>();
                record.iter().position(is_it).ok_or_else(|| LinesError::NoColumn {
                    column: name.clone(),
                    found: cells().join(", ").trim().chars().take(EXCERPT_CHARS).collect(),
                })?
            }
        };
        while self.read_record(&mut csv, &mut record)? {
            let lines = record.as_slice().iter().filter(|&&byte| byte == b'\n').count() as u64;
            let line = csv.position().line() - 1 - lines;
            match record.get(place) {
                Some(cell) => self.add(line, cell),
                None if record.as_slice().trim_ascii().is_empty() => {}
                None => self.refuse(line, &format!("it has no column {}", place + 1)),
            }
        }
        Ok(())
    }

    /// Reads a record. Returns `false` at the end, and at a record that is broken, which it refuses.
    fn read_record(
        &mut self,
        csv: &mut csv::Reader<impl Read>,
        record: &mut csv::ByteRecord,
    ) -> Result<bool, LinesError> {
        let error = match csv.read_byte_record(record).map_err(csv::Error::into_kind) {
            Ok(is_one) => return Ok(is_one),
            Err(csv::ErrorKind::Io(error)) => error,
            Err(_) => unreachable!("records may have any length and any bytes"),
        };
        let BrokenRecord { line, problem } = error.downcast()?;
        self.refuse(line, problem);
        Ok(false)
    }

    /// Takes the number in a line, if there is one.
    fn add(&mut self, line: u64, text: &[u8]) {
        if text.len() > LINE_BYTES_MAX {
            return self.refuse(line, &format!("it is longer than {LINE_BYTES_MAX} bytes"));
        }
        let Ok(text) = str::from_utf8(text) else {
            return self.refuse(line, "it is not UTF-8");
        };
        let text = text.trim();
        if text.is_empty() || self.layout.skip.as_deref() == Some(text) {
            return;
        }
        if text.contains('\n') {
            return self.refuse(line, "its number has a line break");
        }
        if let Err(problem) = (self.each)(line, text) {
            self.refuse(line, &problem);
        }
    }

    fn refuse(&mut self, line: u64, problem: &str) {
        let line = line + self.layout.lines_before;
        self.wrong.count += 1;
        if self.wrong.first.len() < DESCRIBED_MAX {
            self.wrong.first.push((line, problem.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        Space::new("0", "999", 0).unwrap()
    }

    fn layout(column: Option<&str>, skip: Option<&str>) -> Layout {
        let column = column.map(|column| column.parse().unwrap());
        Layout { column, skip: skip.map(str::to_owned), ..Layout::default() }
    }

    /// Returns the values, or the text of the error.
    fn read_all(text: &str, layout: &Layout) -> Result<Vec<i64>, String> {
        let values = read(text.as_bytes(), layout, &space()).map_err(|error| error.to_string())?;
        Ok(values.into_iter().map(|value| value.0).collect())
    }

    #[test]
    fn lines_with_blank_ones_and_a_header() {
        let check = |text, column, skip, expected: &[i64]| {
            assert_eq!(read_all(text, &layout(column, skip)), Ok(expected.to_vec()), "{text:?}");
        };
        check("", None, None, &[]);
        check("1\n2", None, None, &[1, 2]);
        check("\u{feff}1\r\n\r\n  \t\r\n 002 \r\n", None, None, &[1, 2]);
        check("number\n7\nnumber\n8\n", None, Some("number"), &[7, 8]);
        check("a,number\nx,1\n\n\"y\ny\",2\nz,\n", Some("number"), None, &[1, 2]);
        check("\u{feff}number;a\n5\n", Some("1"), Some("number;a"), &[5]);
        check("1,10\n2,20\n", Some("2"), None, &[10, 20]);
        check("x,number\n1,30\n", Some("2"), Some("number"), &[30]);
    }

    #[test]
    fn the_first_ten_wrong_lines_are_named_and_all_are_counted() {
        let error = read_all("1\nx\n1000\n\n5", &Layout::default()).unwrap_err();
        let expected = "2 lines are wrong, so nothing was imported\n\
            line 2: \"x\" is not a decimal number\nline 3: 1000 is not in the range 0 to 999";
        assert_eq!(error, expected);
        let error = read_all(&"x\n".repeat(12), &Layout::default()).unwrap_err();
        assert!(error.starts_with("12 lines are wrong"), "{error}");
        assert_eq!(error.lines().count(), 11);
        let long = format!("{}\n7\nx\n", "9".repeat(3 * LINE_BYTES_MAX));
        let error = read_all(&long, &Layout::default()).unwrap_err();
        assert!(error.contains("line 1: it is longer than 1024 bytes\nline 3: "), "{error}");
        let error = read_all("a,b\n1,2\n3\n", &layout(Some("b"), None)).unwrap_err();
        assert!(error.ends_with("line 3: it has no column 2"), "{error}");
        let error = read_all("a,b\n1,2\n", &layout(Some("c"), None)).unwrap_err();
        assert!(error.contains("no column \"c\""), "{error}");
        let error = read(&b"\xff\n"[..], &Layout::default(), &space()).unwrap_err().to_string();
        assert!(error.ends_with("line 1: it is not UTF-8"), "{error}");
    }

    #[test]
    fn a_csv_that_breaks_rfc_4180_is_refused() {
        let read_all = |text: &str| read_all(text, &layout(Some("2"), None));
        let refused = |text: &str, expected: &[&str]| {
            let error = read_all(text).expect_err(text);
            assert_eq!(error.lines().skip(1).collect::<Vec<_>>(), expected, "{text:?}");
        };
        let unclosed = "line 2: a quotation mark is not closed";
        refused("a,1,x\na,2,\"5 pcs\na,3,x\n\n", &[unclosed]);
        refused("a,1,x\na,\"2\na,3,x\n", &[unclosed]);
        refused("a,1,x\na,2,\"", &[unclosed]);
        refused("a,1,x\na,2,\"5 pcs\"\"\n", &[unclosed]);
        refused("a,x\na,2,\"5 pcs\na,3,x", &["line 1: \"x\" is not a decimal number", unclosed]);
        let after = "line 2: text follows a closing quotation mark";
        refused("a,1,x\na,2,\"5 pcs\na,3,\"x\"\na,4,y\n", &[after]);
        refused("a,1,x\na,\"2\" ,x\n", &[after]);
        let inside = "line 2: a quotation mark is in a cell that does not begin with one";
        refused("a,1,x\na,2,5\" pcs\n", &[inside]);
        refused("a,1,x\na,2, \"5, 6\"\n", &[inside]);
        let alone = "line 1: a carriage return is not at the end of a line";
        refused("a,1\ra,2\ra,3\r", &[alone]);
        refused("a,\"1\"\ra,2\n", &[alone]);
        refused("a,1\na,\"2\n3\"\n", &["line 2: its number has a line break"]);
        let many = "a,2,x\n".repeat(200_000);
        let long = "line 1: its record is longer than 1 MiB; a quotation mark may not be closed";
        refused(&format!("a,1,\"5 pcs\n{many}"), &[long]);
        let long = "1".repeat(LINE_BYTES_MAX + 1);
        refused(&format!("a,{long}\n"), &["line 1: it is longer than 1024 bytes"]);

        let allowed = |text: &str, expected: &[i64]| {
            assert_eq!(read_all(text), Ok(expected.to_vec()), "{text:?}");
        };
        allowed("\u{feff}\"a\",\"1\",\"\"\r\n\"a\",\"2\"\r\na,3\r", &[1, 2, 3]);
        allowed("a,1,\"two\r\nlines, \"\"quoted\"\"\"\na, 2 ,\"\"\"\"\n\r\n\n", &[1, 2]);
        allowed(&many, &[2; 200_000]);
        let long = "x".repeat(LINE_BYTES_MAX + 1);
        allowed(&format!("{long},1,\"{long}\"\n"), &[1]);
    }

    #[test]
    fn wrong_lines_are_added_up() {
        let wrong = |lines: std::ops::Range<u64>| {
            let first = lines.clone().map(|line| (line, "wrong".to_owned()));
            let count = lines.count() as u64;
            WrongLines { count, first: first.take(DESCRIBED_MAX).collect() }
        };
        let mut sum = wrong(20..23);
        sum.add(wrong(1..2));
        sum.add(wrong(30..50).to_string().parse().unwrap());
        let text = sum.to_string();
        assert!(text.starts_with("24 lines are wrong, so nothing was imported\nline 1: wrong\n"));
        assert!(text.ends_with("\nline 35: wrong") && text.lines().count() == 11, "{text}");
        assert!("line is the number of the first line".parse::<WrongLines>().is_err());
    }
}
