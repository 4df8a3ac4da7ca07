//! The description of the routes and parameters of receipts.

use std::sync::Arc;
use std::time::SystemTime;

use axum::http::StatusCode;
use serde_json::json as json_value;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::AnyOfBuilder;
use utoipa::openapi::{Object, ObjectBuilder, Required, Type};

use super::{Offer, Route, described, sample, shard};
use crate::http::receipts::NDJSON;
use crate::http::response::{ApiError, JsonResponse, json, typed};
use crate::receipts::{Caller, Given, KEY_BYTES_MAX, KeyDigest, LABEL_BYTES_MAX, Origin, Receipt};

impl Offer<'_> {
    /// Describes `/receipts`.
    pub(super) fn receipts(&self) -> Route {
        let line = serde_json::to_string(&self.receipt_example()).expect("texts as keys") + "\n";
        let example: JsonResponse = typed(NDJSON, None, line.into_bytes());
        let bad = |name| ApiError::BadNumber { name, given: "x".to_owned() };
        let unknown = ApiError::UnknownParameter {
            given: "colour".to_owned(),
            allowed: "after, limit, label",
        };
        Route {
            summary: "All receipts",
            description: "A JSON object a line, in the order of the commits. To go on later, send the `seq` of \
                          the last line as `after`: no receipt is skipped."
                .to_owned(),
            parameters: vec![
                number("after", "Only receipts after this sequence number."),
                number("limit", "The most receipts."),
                label(ParameterIn::Query, "Only receipts with this label."),
            ],
            responses: described(
                "The receipts.",
                Object::with_type(Type::String),
                vec![("one receipt".to_owned(), example)],
            ),
            errors: vec![
                ("?after=x".to_owned(), bad("after")),
                ("?limit=x".to_owned(), bad("limit")),
                ("?label=".to_owned(), ApiError::BadLabel),
                ("?colour=red".to_owned(), unknown),
                ("the store of the receipts is away".to_owned(), ApiError::ReceiptsAway),
            ],
            ..Route::default()
        }
    }

    /// Describes `/receipts/{pool}/{number}`.
    pub(super) fn receipt(&self) -> Route {
        let text = |name: &str, description: &str| {
            ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Path)
                .required(Required::True)
                .description(Some(description))
                .schema(Some(Object::with_type(Type::String)))
                .build()
        };
        let example = json(StatusCode::OK, &self.receipt_example());
        let mut errors = vec![
            ("a number that was not given to this caller".to_owned(), ApiError::NoReceipt),
            ("the quota of look-ups is used up".to_owned(), ApiError::OverQuota { seconds: 1 }),
            ("the store of the receipts is away".to_owned(), ApiError::ReceiptsAway),
        ];
        if !self.guard.has_lookups() {
            errors.push(("no index is kept".to_owned(), ApiError::LookupsOff));
        }
        Route {
            summary: "The receipt of a number",
            description: "For the owner of the token that drew it, and for tokens of the scope `audit`. To all \
                          others, and for numbers that were not handed out, the response is the same 404."
                .to_owned(),
            parameters: vec![text("pool", "The pool."), text("number", "The number or code.")],
            responses: described(
                "The receipt.",
                Object::with_type(Type::Object),
                vec![("a number".to_owned(), example)],
            ),
            errors,
            ..Route::default()
        }
    }

    fn receipt_example(&self) -> Receipt {
        let caller = match self.asks_for_tokens() {
            true => Caller { owner: "shop".into(), token: "shop.2026".into() },
            false => Caller::default(),
        };
        let pool = self.pools.first().expect("there is at least one");
        let (pool, space) = (pool.name.clone(), pool.space.clone());
        let parts = vec![(shard(&pool).into(), vec![sample(&space)])];
        Receipt {
            seq: 1,
            at: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_800_000_000),
            origin: Arc::new(Origin { pool, space }),
            caller,
            label: None,
            key: Some(KeyDigest::new("shop", "order-17")),
            given: Given { is_short: true, parts },
            digest: [0x5a; 32],
        }
    }
}

/// Describes the header `Idempotency-Key`.
pub(super) fn key() -> Parameter {
    ParameterBuilder::new()
        .name("Idempotency-Key")
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(
            "Makes retries safe: all requests with the same key get the response of the first one. Choose a new \
             key for each request, such as a UUID. It may be in quotation marks.",
        ))
        .schema(Some(
            ObjectBuilder::new()
                .schema_type(Type::String)
                .pattern(Some(format!("^[!#-~]{{1,{KEY_BYTES_MAX}}}$"))),
        ))
        .build()
}

/// Describes the parameter `label`.
pub(super) fn label(place: ParameterIn, description: &str) -> Parameter {
    let text =
        |pattern: String| ObjectBuilder::new().schema_type(Type::String).pattern(Some(pattern));
    // A pattern counts characters, which have up to four bytes.
    let (ascii, any) = (LABEL_BYTES_MAX, LABEL_BYTES_MAX / 4);
    let schema = AnyOfBuilder::new()
        .item(text(format!("^[ -~]{{1,{ascii}}}$")))
        .item(text(format!("^[^\\u0000-\\u001f\\u007f-\\u009f]{{1,{any}}}$")));
    ParameterBuilder::new()
        .name("label")
        .parameter_in(place)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(schema))
        .build()
}

fn number(name: &str, description: &str) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Query)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(
            ObjectBuilder::new()
                .schema_type(Type::Integer)
                .minimum(Some(0))
                .maximum(Some(json_value!(i64::MAX).as_f64().unwrap_or(f64::MAX))),
        ))
        .build()
}
