//! Responses with one number a line: which format `Accept` selects, and a body that is written slice by slice
//! while it is sent. Knows nothing of pools, or of how the values were taken.

use std::convert::Infallible;
use std::iter::Flatten;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::vec;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::header::ACCEPT;
use axum::http::{HeaderMap, HeaderValue};
use http_body_util::Either;
use hyper::body::Frame;

use super::response::{SLICE_BYTES, typed};
use super::{AnyResponse, many_of, whole};
use crate::space::{Number, Space, Value};

/// The longest line in bytes: a code of 64 characters that all have to be escaped, two quotes and the line's
/// end.
const LINE_BYTES_MAX: usize = 2 * 64 + 3;

/// The format of a response with several numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// One JSON object.
    Json,
    /// Lines of CSV with one field, without a header line.
    Csv,
    /// Lines of JSON.
    NdJson,
}

impl Format {
    /// All formats. The last one wins ties.
    const ALL: [Self; 3] = [Self::NdJson, Self::Csv, Self::Json];

    /// Returns the format that the headers prefer, or JSON if they accept none of the formats
    /// (RFC 9110, section 12.5.1).
    pub(super) fn accepted(headers: &HeaderMap) -> Self {
        let weight = |format: &Self| {
            let values = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
            let ranges = values.flat_map(|value| value.split(',')).map(MediaRange::parse);
            let fits = ranges
                .filter_map(|range| Some((range.precision(format.media_type())?, range.weight)));
            // The most precise range that includes the format decides.
            fits.max().map_or(0, |(_, weight)| weight)
        };
        Self::ALL.into_iter().max_by_key(weight).expect("there are three")
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Csv => "text/csv",
            Self::NdJson => "application/x-ndjson",
        }
    }

    /// Returns the value of `Content-Type`.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Csv => "text/csv; charset=utf-8",
            Self::Json | Self::NdJson => self.media_type(),
        }
    }

    /// Appends a line with the number.
    pub(super) fn push_line(self, number: &Number, lines: &mut String) {
        match self {
            Self::Json | Self::NdJson => number.push_json(lines),
            Self::Csv => push_field(number.as_str(), lines),
        }
        lines.push('\n');
    }
}

/// Appends a field of CSV, in quotes if it needs them (RFC 4180, section 2).
pub(crate) fn push_field(text: &str, lines: &mut String) {
    if text.contains(['"', ',', '\n', '\r']) {
        lines.extend(["\"", &text.replace('"', "\"\""), "\""]);
    } else {
        lines.push_str(text);
    }
}

/// A media range of `Accept`, with its weight. Other parameters are ignored.
struct MediaRange<'a> {
    range: &'a str,
    /// The weight in thousandths. With 0, the media types are not acceptable.
    weight: u16,
}

impl<'a> MediaRange<'a> {
    fn parse(text: &'a str) -> Self {
        let (range, parameters) = text.split_once(';').unwrap_or((text, ""));
        let weight = parameters.split(';').find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim().eq_ignore_ascii_case("q").then(|| value.trim())
        });
        let thousandths = |weight: &str| {
            let weight = weight.parse().ok().filter(|weight| (0.0..=1.0).contains(weight));
            // A malformed weight selects nothing, so that the response is JSON.
            weight.map_or(0, |weight: f32| (weight * 1_000.0).round() as u16)
        };
        Self { range: range.trim(), weight: weight.map_or(1_000, thousandths) }
    }

    /// Returns how many parts of the media type the range names, or `None` if it does not include the media
    /// type.
    fn precision(&self, media_type: &str) -> Option<u8> {
        let (type_, _) = media_type.split_once('/')?;
        match self.range.split_once('/')? {
            ("*", "*") => Some(0),
            (named, "*") if named.eq_ignore_ascii_case(type_) => Some(1),
            _ if self.range.eq_ignore_ascii_case(media_type) => Some(2),
            _ => None,
        }
    }
}

/// Returns a response with the numbers of these shards in the format.
pub(super) fn response(
    format: Format,
    space: &Space,
    parts: Vec<(Arc<str>, Vec<Value>)>,
) -> AnyResponse {
    if format == Format::Json {
        return whole(many_of(space, &parts));
    }
    let values: Vec<_> = parts.into_iter().map(|(_, values)| values).collect();
    let lines = Lines { format, space: space.clone(), values: values.into_iter().flatten() };
    let content_type = HeaderValue::from_static(format.content_type());
    typed(content_type, None, Either::Right(Body::new(lines)))
}

/// The lines of a response that are still to be written. Beside the values, it needs the memory of one slice.
struct Lines {
    format: Format,
    space: Space,
    values: Flatten<vec::IntoIter<Vec<Value>>>,
}

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Self { format, space, values } = &mut *self;
        let mut slice = String::with_capacity(SLICE_BYTES);
        while slice.len() <= SLICE_BYTES - LINE_BYTES_MAX
            && let Some(value) = values.next()
        {
            format.push_line(&space.number(value), &mut slice);
        }
        Poll::Ready((!slice.is_empty()).then(|| Ok(Frame::data(Bytes::from(slice)))))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;
    use crate::space::CodeFormat;

    #[test]
    fn accept_selects_a_format() {
        let check = |accept: &[&str], expected| {
            let values = accept.iter().map(|text| (ACCEPT, HeaderValue::try_from(*text).unwrap()));
            assert_eq!(Format::accepted(&values.collect()), expected, "{accept:?}");
        };
        check(&[], Format::Json);
        check(&[""], Format::Json);
        check(&["*/*"], Format::Json);
        check(&["application/*"], Format::Json);
        check(&["text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"], Format::Json);
        check(&["text/csv"], Format::Csv);
        check(&["text/*"], Format::Csv);
        check(&["Text/CSV ; header=absent; Q=0.2 , application/json;q=0.1"], Format::Csv);
        check(&["application/x-ndjson"], Format::NdJson);
        check(&["application/json;q=0.999, application/x-ndjson;q=1.000"], Format::NdJson);
        // Two headers are one list.
        check(&["application/json;q=0.5", "text/csv;q=0.6"], Format::Csv);
        // JSON wins ties, also if a range includes it.
        check(&["text/csv, application/json"], Format::Json);
        check(&["text/csv, */*"], Format::Json);
        check(&["text/csv, */*;q=0.9"], Format::Csv);
        // A precise range overrules a wider one, wherever it stands.
        check(&["application/json;q=0, */*"], Format::Csv);
        check(&["*/*, application/*;q=0.1, application/x-ndjson"], Format::Csv);
        check(&["text/csv;q=0, text/*"], Format::Json);
        // JSON is sent if nothing is acceptable.
        check(&["image/png"], Format::Json);
        check(&["*/*;q=0"], Format::Json);
        // Malformed ranges select nothing.
        for weight in ["high", "-1", "2", "NaN", "1e3", ""] {
            check(&[&format!("text/csv;q={weight}")], Format::Json);
        }
        check(&["csv, text, /, ;q=1"], Format::Json);
    }

    #[tokio::test]
    async fn slices_are_bounded_and_contain_every_line() {
        let ints = Space::new("-9000000000000000", "9000000000000000", 0).unwrap();
        // Each character of these codes has to be escaped.
        let codes = Space::of_codes(CodeFormat::new(&"#".repeat(62), "\"\\", "none").unwrap());
        for (space, format) in
            [(&ints, Format::Csv), (&ints, Format::NdJson), (&codes, Format::NdJson)]
        {
            let parts: Vec<(Arc<str>, Vec<Value>)> = vec![
                ("a".into(), (0..3_000).map(Value).collect()),
                ("b".into(), Vec::new()),
                ("c".into(), vec![space.max(), space.min()]),
            ];
            let mut expected = String::new();
            for &value in parts.iter().flat_map(|(_, values)| values) {
                format.push_line(&space.number(value), &mut expected);
            }
            let response = response(format, space, parts);
            assert_eq!(response.headers()["content-type"], format.content_type());
            let Either::Right(mut body) = response.into_body() else {
                panic!("the body is whole");
            };
            let mut text = Vec::new();
            while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await
            {
                let slice = frame.unwrap().into_data().unwrap();
                assert!((1..=SLICE_BYTES).contains(&slice.len()), "{}", slice.len());
                text.extend_from_slice(&slice);
            }
            assert_eq!(String::from_utf8(text).unwrap(), expected);
        }
    }
}
