//! The description of the route that imports numbers.

use axum::http::StatusCode;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::{ContentBuilder, Object, ObjectBuilder, Required, Type};

use super::{Offer, Route, described, sample};
use crate::http::response::{ApiError, json};
use crate::import::{Outcome, Report};

impl Offer<'_> {
    /// Describes `/pools/{pool}/used`.
    pub(super) fn used(&self) -> Route {
        let pool = self.pools.first().expect("a server has a pool");
        let names = self.pools.iter().map(|pool| pool.name.as_str());
        let pool_parameter = ParameterBuilder::new()
            .name("pool")
            .parameter_in(ParameterIn::Path)
            .required(Required::True)
            .description(Some("The pool."))
            .schema(Some(
                ObjectBuilder::new()
                    .schema_type(Type::String)
                    .enum_values((!self.is_made_up).then(|| names.clone())),
            ))
            .build();
        let text = || Some(Object::with_type(Type::String));
        let content = || ContentBuilder::new().schema(text()).build();
        let body = RequestBodyBuilder::new()
            .description(Some(
                "Numbers or codes, one a line. Blank lines are allowed. In `text/csv`, they are in the column \
                 `column`, or in the first one.",
            ))
            .content("text/plain", content())
            .content("text/csv", content())
            .build();
        let outcome = Outcome {
            marked: 40_000,
            in_shards: 312,
            issued: vec![sample(&pool.space)],
            ..Outcome::default()
        };
        let report = Report::new(&pool.name, &pool.space, &outcome, |_| Some(17));
        let count = |meaning: &str| {
            ObjectBuilder::new().schema_type(Type::Integer).description(Some(meaning))
        };
        let conflict = ObjectBuilder::new().schema_type(Type::Object).property(
            "receipt",
            ObjectBuilder::new().description(Some("The `seq` of its receipt, or null.")),
        );
        let schema = ObjectBuilder::new()
            .property("pool", Object::with_type(Type::String))
            .property("marked", count("Numbers that will never be handed out."))
            .property("marked_in_shards", count("Those of `marked` that were in shards."))
            .property("repeated", count("Numbers that were given more than once."))
            .property("known", count("Numbers that an earlier import had marked."))
            .property("issued_before", count("Numbers that this server had issued or burned."))
            .property(
                "interrupted",
                ObjectBuilder::new().schema_type(Type::Boolean).description(Some(
                    "Whether an earlier import was interrupted. If it was of the same numbers, it is complete now.",
                )),
            )
            .property(
                "conflicts",
                utoipa::openapi::ArrayBuilder::new()
                    .items(conflict.build())
                    .description(Some("The numbers of `issued_before`.")),
            );
        let allowed = names.collect::<Vec<_>>().join(", ");
        let problem =
            "1 line is wrong, so nothing was imported\nline 3: \"x\" is not a decimal number";
        let errors = vec![
            (
                "a pool that does not exist".to_owned(),
                ApiError::UnknownType { given: "none".to_owned(), allowed },
            ),
            (
                "?colour=red".to_owned(),
                ApiError::UnknownParameter {
                    given: "colour".to_owned(),
                    allowed: "check, column, line, skip",
                },
            ),
            (
                "a line that is no number".to_owned(),
                ApiError::BadLines { problem: problem.to_owned() },
            ),
            ("a body that is not text".to_owned(), ApiError::NotText),
            ("an instance of a fleet".to_owned(), ApiError::InFleet),
            ("the disk is full".to_owned(), ApiError::ImportFailed),
        ];
        Route {
            summary: "Import numbers that were issued by other means",
            description: "From the response on, none of these numbers is handed out. If the response is lost, send \
                          the request again. Backups from before the import lack it: after restoring one, import the \
                          numbers again."
                .to_owned(),
            parameters: vec![
                pool_parameter,
                parameter("check", "`true`: only read the lines, and report the wrong ones."),
                parameter("line", "The number of the first line, for the messages."),
                parameter("column", "The column of a CSV: a name in its first line, or a number from 1."),
                parameter("skip", "A text that may stand in place of a number, such as a header."),
            ],
            body: Some(body),
            responses: described(
                "What became of the numbers. The counts except `marked_in_shards` add up to the numbers that were sent.",
                schema,
                vec![("an import".to_owned(), json(StatusCode::OK, &report))],
            ),
            errors,
        }
    }
}

fn parameter(name: &str, description: &str) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Query)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(Object::with_type(Type::String)))
        .build()
}
