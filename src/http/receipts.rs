//! The routes that read receipts: all of them in the order of their commits, or the one of a number.

use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Extension;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use hyper::body::Frame;
use tokio::task::{JoinError, JoinHandle};

use super::App;
use super::guard::Admitted;
use super::quota;
use super::reads::Reads;
use super::response::{ApiError, json, typed};
use crate::config::PoolName;
use crate::receipts::{Filter, Label, Receipt, ReceiptReader, StoreError};

/// The receipts that are read at once.
const PAGE_RECEIPTS: usize = 1000;

pub(super) const NDJSON: HeaderValue = HeaderValue::from_static("application/x-ndjson");

/// The parameters of [`list`].
struct Wanted {
    filter: Filter,
    /// The only pools whose receipts the caller may see, or `None` for all.
    pools: Option<Vec<PoolName>>,
    /// The receipts that are still to be sent.
    limit: usize,
}

/// Handles `GET /receipts`: all receipts after one, a JSON object a line.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Admitted>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let (filter, limit) = parse(query.as_deref().unwrap_or_default())?;
    let pools = app.guard.only_pools(&admitted).map(<[PoolName]>::to_vec);
    let wanted = Wanted { filter, pools, limit };
    let reader = app.keeper.receipts().reader();
    // The first page is read before the response begins, so that a failure is an error response.
    let read = app.reads.start(move || Page::read(&*reader, wanted)).await;
    let first = read.expect("reading does not panic").map_err(|_| ApiError::ReceiptsAway)?;
    let (reader, reads) = (app.keeper.receipts().reader(), Arc::clone(&app.reads));
    Ok(typed(NDJSON, None, Body::new(Pages { reader, reads, next: Next::Read(first) })))
}

fn parse(query: &str) -> Result<(Filter, usize), ApiError> {
    let (mut after, mut limit, mut label) = (None, None, None);
    let allowed = "after, limit, label";
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let parameter = match &*name {
            "after" => &mut after,
            "limit" => &mut limit,
            "label" => &mut label,
            _ => return Err(ApiError::UnknownParameter { given: name.into_owned(), allowed }),
        };
        if parameter.replace(value).is_some() {
            return Err(ApiError::RepeatedParameter { given: name.into_owned(), allowed });
        }
    }
    let number = |name, text: Option<std::borrow::Cow<'_, str>>| {
        let parse = |text: std::borrow::Cow<'_, str>| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            let number =
                text.parse::<u64>().ok().filter(|number| digits && i64::try_from(*number).is_ok());
            number.ok_or_else(|| ApiError::BadNumber { name, given: text.into_owned() })
        };
        text.map(parse).transpose()
    };
    let limit = number("limit", limit)?.map_or(usize::MAX, |limit| limit as usize);
    let after = number("after", after)?.unwrap_or(0);
    let label = label.map(|text| Label::new(text.into_owned()).ok_or(ApiError::BadLabel));
    let label = label.transpose()?.map(|label| label.as_str().to_owned());
    Ok((Filter { after, label }, limit))
}

/// Some receipts as text, and the parameters for those after them.
struct Page {
    text: Vec<u8>,
    rest: Wanted,
}

impl Page {
    /// Reads until a receipt is found that the caller may see. Without one, the text is empty.
    fn read(reader: &dyn ReceiptReader, mut wanted: Wanted) -> Result<Self, StoreError> {
        let mut text = Vec::new();
        while text.is_empty() && wanted.limit > 0 {
            let receipts = reader.page(&wanted.filter, wanted.limit.min(PAGE_RECEIPTS))?;
            let Some(last) = receipts.last() else { break };
            wanted.filter.after = last.seq;
            let sees = |receipt: &&Receipt| {
                wanted.pools.as_ref().is_none_or(|pools| pools.contains(&receipt.origin.pool))
            };
            for receipt in receipts.iter().filter(sees) {
                serde_json::to_writer(&mut text, receipt).expect("receipts have texts as keys");
                text.push(b'\n');
                wanted.limit -= 1;
            }
        }
        Ok(Self { text, rest: wanted })
    }
}

/// A body that reads a page when the one before it was sent.
struct Pages {
    reader: Arc<dyn ReceiptReader>,
    reads: Arc<Reads>,
    next: Next,
}

enum Next {
    Read(Page),
    Reading(JoinHandle<Result<Page, StoreError>>),
    End,
}

/// Why the rest of the receipts could not be sent.
#[derive(Debug, thiserror::Error)]
enum PageError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Task(#[from] JoinError),
}

impl HttpBody for Pages {
    type Data = Bytes;
    type Error = PageError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, PageError>>> {
        let page = match mem::replace(&mut self.next, Next::End) {
            Next::End => return Poll::Ready(None),
            Next::Read(page) => page,
            Next::Reading(mut reading) => match Pin::new(&mut reading).poll(context) {
                Poll::Ready(read) => read??,
                Poll::Pending => {
                    self.next = Next::Reading(reading);
                    return Poll::Pending;
                }
            },
        };
        let Page { text, rest } = page;
        if text.is_empty() {
            return Poll::Ready(None);
        }
        let reader = Arc::clone(&self.reader);
        self.next = Next::Reading(self.reads.start(move || Page::read(&*reader, rest)));
        Poll::Ready(Some(Ok(Frame::data(text.into()))))
    }
}

/// Handles `GET /receipts/{pool}/{number}`. The response to a number without a receipt of this caller is always
/// the same, and takes about as long, so that it does not tell whether the number exists, was issued, or is
/// another caller's.
pub(super) async fn of_number(
    State(app): State<Arc<App>>,
    Extension(admitted): Extension<Admitted>,
    path: Result<Path<(String, String)>, axum::extract::rejection::PathRejection>,
) -> Result<Response, ApiError> {
    if !app.guard.has_lookups() {
        return Err(ApiError::LookupsOff);
    }
    quota::charge(admitted.account.as_ref(), None)?;
    let (name, text) = path.map(|Path(path)| path).unwrap_or_default();
    let pools = &app.pools;
    let pool = pools.iter().find(|pool| pool.name().as_str() == name);
    if let Some(pool) = pool
        && !app.guard.allows(&admitted, pool.name())
    {
        return Err(ApiError::ForbiddenPool { given: name });
    }
    let value = pool.and_then(|pool| pool.space().parse(&text).ok());
    // A number that can't exist takes the same way as one that has no receipt.
    let other = &pools[0];
    let pool = pool.unwrap_or(other);
    let (name, sought) = (pool.name().clone(), value.unwrap_or(pool.space().min()));
    let owner = Arc::clone(&app.guard.caller(&admitted).owner);
    let reader = app.keeper.receipts().reader();
    let read = app.reads.start(move || {
        let owner = (!admitted.sees_all).then_some(&*owner);
        reader.of_number(&name, sought, owner)
    });
    let read = read.await.expect("reading does not panic");
    let found = read.map_err(|_| ApiError::ReceiptsAway)?;
    let receipt = found.filter(|_| value.is_some());
    receipt.map(|receipt| json(StatusCode::OK, &receipt).map(Body::from)).ok_or(ApiError::NoReceipt)
}
