//! The OpenAPI 3.1 description of this server, generated from its routes, its settings, its wire types and
//! the table of status codes. Knows nothing of requests.

mod import;
mod receipts;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde_json::{Value as Json, json as json_value};
use utoipa::ToSchema;
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::path::{
    Operation, OperationBuilder, Parameter, ParameterBuilder, ParameterIn,
};
use utoipa::openapi::request_body::{RequestBody, RequestBodyBuilder};
use utoipa::openapi::schema::AdditionalProperties;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{
    AllOfBuilder, ComponentsBuilder, Content, ContentBuilder, Header, HeaderBuilder, InfoBuilder,
    LicenseBuilder, Object, ObjectBuilder, OpenApiBuilder, PathItem, PathsBuilder, Ref, RefOr,
    Required, Response, ResponseBuilder, Schema, SecurityRequirement, Tag, Type,
};

use super::guard::{self, Guard};
use super::health::{self, HealthBody};
use super::lines::Format;
use super::query::{Names, Parameters};
use super::ready::{self, ReadyBody};
use super::response::{
    ApiError, BODY_MAX, Code, ErrorBody, HEADERS, IMPORT_MAX, JsonResponse, json,
};
use super::{
    DOCS, HEALTH, METRICS, Many, ManyCodes, OPENAPI, One, OneCode, RANDOM, READY, RECEIPT,
    RECEIPTS, RELOAD, Reloaded, STATUS, USED, docs, keyed, many_of, metrics, one_of, page, query,
    status,
};
use crate::config::PoolName;
use crate::monitor::Monitor;
use crate::pool::{Pool, PoolHealth};
use crate::space::{Space, Value};
use crate::traffic::Traffic;

/// The description of the whole API.
const DESCRIPTION: &str = "Hands out unique random numbers, and never the same one twice.\n\n\
    Errors are JSON: `error` is a sentence for people, `code` a word for programs. All other responses \
    are JSON too, except `/metrics`, the pages, and several numbers if `Accept` prefers lines. Responses \
    are not cached, except the files of `/docs`, which are cached for an hour. A path that supports `GET` supports `HEAD` too. Only `POST /random` \
    and `POST /pools/{pool}/used` read a body; with other requests, up to 16 KiB of a body are ignored.";

/// A static example, because the figures of this server need a token.
const METRICS_EXAMPLE: &str = "# HELP tombola_shard_numbers_left Numbers of the live generation that have not been handed out.\n\
    # TYPE tombola_shard_numbers_left gauge\n\
    tombola_shard_numbers_left{pool=\"int\",shard=\"int_shard_0.db\"} 2500000\n";

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The name of the security scheme.
const TOKEN: &str = "token";

/// The groups of routes, in the order in which they are shown.
const TAGS: [&str; 5] = ["numbers", "receipts", "administration", "operations", "pages"];

/// The parts of a server that the description depends on.
pub(super) struct Offer<'a> {
    pools: Vec<Example>,
    /// Whether the caller may see no pool, so that the only one here is made up.
    is_made_up: bool,
    count_limit: NonZeroU32,
    guard: &'a Guard,
}

/// A pool as the examples show it.
struct Example {
    name: PoolName,
    space: Space,
    shards: usize,
}

/// The description of a route. It is empty for a route that has none yet, which a test detects.
#[derive(Default)]
struct Route {
    summary: &'static str,
    description: String,
    parameters: Vec<Parameter>,
    body: Option<RequestBody>,
    responses: Vec<(StatusCode, Response)>,
    /// The error responses, each with the query that causes it, or the cause in words.
    errors: Vec<(String, ApiError)>,
}

impl<'a> Offer<'a> {
    /// Returns the offer to a caller that may see these pools.
    pub(super) fn new<'p>(
        pools: impl Iterator<Item = &'p Arc<Pool>>,
        count_limit: NonZeroU32,
        guard: &'a Guard,
    ) -> Self {
        let example = |pool: &Arc<Pool>| Example {
            name: pool.name().clone(),
            space: pool.space().clone(),
            shards: pool.health().shards,
        };
        let mut pools: Vec<_> = pools.map(example).collect();
        let is_made_up = pools.is_empty();
        if is_made_up {
            let name = PoolName::new(query::TYPE_DEFAULT).expect("the default is a name");
            let space = Space::from_values(Value(1), Value(1_000_000), 0).expect("a range");
            pools.push(Example { name, space, shards: 1 });
        }
        Self { pools, is_made_up, count_limit, guard }
    }

    /// Returns the description of these routes, given as paths and their methods.
    pub(super) fn describe(&self, routes: &[(&'static str, &'static str)]) -> String {
        let paths = routes.iter().fold(PathsBuilder::new(), |paths, &(path, methods)| {
            paths.path(path, self.path_item(path, methods))
        });
        let license = LicenseBuilder::new()
            .name(env!("CARGO_PKG_LICENSE"))
            .identifier(Some(env!("CARGO_PKG_LICENSE")));
        let info = InfoBuilder::new()
            .title(env!("CARGO_PKG_NAME"))
            .version(env!("CARGO_PKG_VERSION"))
            .description(Some(DESCRIPTION))
            .license(Some(license.build()));
        let mut schemas = Vec::new();
        for schemas_of in [
            schemas_of::<One>,
            schemas_of::<Many>,
            schemas_of::<OneCode>,
            schemas_of::<ManyCodes>,
            schemas_of::<ErrorBody>,
            schemas_of::<HealthBody<'_>>,
            schemas_of::<ReadyBody<'_>>,
            schemas_of::<status::Status>,
            schemas_of::<Reloaded>,
        ] {
            schemas_of(&mut schemas);
        }
        let mut components = ComponentsBuilder::new().schemas_from_iter(schemas);
        if self.asks_for_tokens() {
            let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(
                "`Authorization: Bearer TOKEN`. A token has the scope `draw` for numbers, `lookup` for the \
                 receipts of numbers, `audit` for all receipts, `admin` for imports and reloads, or `observe` for \
                 everything else. \
                 `tombola token new` creates one.",
            ));
            components = components.security_scheme(TOKEN, SecurityScheme::Http(scheme.build()));
        }
        OpenApiBuilder::new()
            .info(info.build())
            .paths(paths.build())
            .components(Some(components.build()))
            .tags(Some(TAGS.map(Tag::new)))
            .build()
            .to_json()
            .expect("a description has no maps with odd keys")
    }

    fn asks_for_tokens(&self) -> bool {
        self.guard.asks_for_tokens()
    }

    fn burst(&self) -> Option<NonZeroU32> {
        self.guard.burst()
    }

    fn path_item(&self, path: &str, methods: &'static str) -> PathItem {
        methods.split(", ").fold(PathItem::default(), |mut item, method| {
            let operation = Some(self.operation(path, methods, method));
            match method {
                "POST" => item.post = operation,
                "HEAD" if path == RANDOM => item.head = operation,
                // On other paths, HEAD is GET without a body.
                "HEAD" => {}
                _ => item.get = operation,
            }
            item
        })
    }

    fn operation(&self, path: &str, methods: &'static str, method: &str) -> Operation {
        let Route { summary, description, parameters, body, responses, mut errors } = match path {
            RANDOM => self.random(method),
            RECEIPTS => self.receipts(),
            RECEIPT => self.receipt(),
            USED => self.used(),
            HEALTH => self.health(),
            READY => self.ready(),
            STATUS => self.status(),
            METRICS => self.metrics(),
            RELOAD => self.reload(),
            OPENAPI => description(),
            DOCS => docs_page(),
            docs::FILE => docs_file(),
            _ => page_part(path).unwrap_or_default(),
        };
        if self.guard.hides_pools() && matches!(path, RANDOM | RECEIPT | USED) {
            let error = ApiError::ForbiddenPool { given: "tickets".to_owned() };
            errors.push(("a pool of other tokens".to_owned(), error));
        }
        let scope = guard::scope(path);
        if scope.is_some() && !self.asks_for_tokens() {
            errors.push(("a web page of another site".to_owned(), ApiError::CrossSite));
            if self.guard.checks_host() {
                errors.push(("another name in `Host`".to_owned(), ApiError::OtherHost));
            }
        }
        let scope = scope.filter(|_| self.asks_for_tokens());
        if let Some(scope) = scope {
            errors.push(("no token, or an unknown one".to_owned(), ApiError::Unauthorized));
            errors.push(("a token that has expired".to_owned(), ApiError::Expired));
            errors.push(("a token of another scope".to_owned(), ApiError::Forbidden { scope }));
        }
        errors.push(("DELETE".to_owned(), ApiError::WrongMethod { allowed: methods }));
        let limit = if path == USED { IMPORT_MAX } else { BODY_MAX };
        errors.push((format!("a body of {} bytes", limit + 1), ApiError::too_large(limit)));
        let head_too_large = ResponseBuilder::new()
            .description("The request's head has more than 16 KiB or 100 lines. There is no body.");
        let operation_id = format!("{}{}", method.to_lowercase(), path)
            .replace(['/', '.'], "_")
            .replace(['{', '}'], "");
        let mut operation = OperationBuilder::new()
            .summary(Some(summary))
            .description(Some(description))
            .operation_id(Some(operation_id))
            .tag(tag(path))
            .request_body(body)
            .response("431", head_too_large);
        for parameter in parameters {
            operation = operation.parameter(parameter);
        }
        for (status, mut response) in responses.into_iter().chain(error_responses(errors)) {
            if method == "HEAD" {
                response.content.clear();
            }
            operation = operation.response(status.as_str(), response);
        }
        if let Some(scope) = scope {
            operation = operation.security(SecurityRequirement::new(TOKEN, [scope.as_str()]));
        }
        operation.build()
    }

    fn random(&self, method: &str) -> Route {
        let mut responses: Vec<_> = self.pools.iter().map(one).collect();
        let has_codes = |pool: &&Example| pool.space.codes().is_some();
        let mut schema = utoipa::openapi::OneOfBuilder::new();
        if let Some(pool) = self.pools.iter().find(|pool| !has_codes(pool)) {
            responses.push(many(pool));
            schema = schema.item(Ref::from_schema_name(One::name()));
            schema = schema.item(Ref::from_schema_name(Many::name()));
        }
        if let Some(pool) = self.pools.iter().find(has_codes) {
            responses.push(many(pool));
            schema = schema.item(Ref::from_schema_name(OneCode::name()));
            schema = schema.item(Ref::from_schema_name(ManyCodes::name()));
        }
        let mut responses =
            described("Numbers that were never handed out before.", schema, responses);
        for (_, response) in &mut responses {
            for format in [Format::Csv, Format::NdJson] {
                let content = self.lines(format);
                response.content.insert(format.content_type().to_owned(), content.into());
            }
        }

        // The errors come from the parser itself.
        let sorted: Vec<_> = self.pools.iter().map(|pool| pool.name.clone()).collect();
        let names = Names { sorted: &sorted, caller: None };
        let mut errors: Vec<_> =
            ["?type=", "?count=0", "?label=", "?colour=red", "?count=1&count=2"]
                .into_iter()
                .filter_map(|query| {
                    let (limit, query) = (Some(self.count_limit), Some(&query[1..]));
                    let read = query::parse(&names, limit, query, Parameters::default());
                    Some((format!("?{}", query?), read.err()?))
                })
                .collect();
        if let Some(burst) = self.burst() {
            let asked = burst.get().saturating_add(1);
            if asked <= self.count_limit.get() {
                errors.push((
                    format!("?count={asked}"),
                    ApiError::AboveBurst { asked, burst: burst.get() },
                ));
            }
            // HEAD takes no number, so nothing is charged.
            if method != "HEAD" {
                errors
                    .push(("the quota is used up".to_owned(), ApiError::OverQuota { seconds: 1 }));
            }
        }
        errors.extend([
            (
                "the range is used up".to_owned(),
                ApiError::Exhausted { asked: 1, left: 0, shared: false },
            ),
            (
                "3 numbers are left".to_owned(),
                ApiError::Exhausted { asked: 5, left: 3, shared: false },
            ),
            (
                "other instances of the fleet may have some".to_owned(),
                ApiError::Exhausted { asked: 1, left: 0, shared: true },
            ),
            ("demand exceeds the refill rate".to_owned(), ApiError::Refilling),
        ]);
        errors.push(("a prefetch of a browser".to_owned(), ApiError::Prefetch));
        if method == "POST" {
            let body = |body: &str| {
                let headers = HeaderMap::from_iter([(CONTENT_TYPE, JSON)]);
                let read = Parameters::of_body(&Method::POST, &headers, body.as_bytes());
                Some((format!("the body {body}"), read.err()?))
            };
            errors.extend(
                [r#"{"colour":"red"}"#, r#"{"count":-1}"#, "[]"].into_iter().filter_map(body),
            );
            errors.push(("a body that is not JSON".to_owned(), ApiError::NotJson));
            errors.extend([
                ("an empty key".to_owned(), ApiError::BadKey),
                ("a pool without receipts".to_owned(), keyed::OF_POOL),
                (
                    "the key of another request".to_owned(),
                    ApiError::KeyReused { used_for: "type=int, count=5".to_owned() },
                ),
                ("the disk is full".to_owned(), ApiError::ReceiptNotSaved),
            ]);
        } else if method == "GET" {
            errors.push(("a key".to_owned(), ApiError::KeyNeedsPost));
        }
        let (summary, description) = match method {
            "HEAD" => (
                "Get the status of GET without taking a number",
                "Checks whether there are numbers, without using one up.",
            ),
            "POST" => (
                "Take numbers",
                "The same as GET. The parameters can be in the body, as JSON, or in the URL.",
            ),
            _ => (
                "Take numbers",
                "Returns one number; with `count`, that many or none. With `count`, `Accept` selects \
                 JSON, or lines of CSV or JSON that are sent as they are written.",
            ),
        };
        Route {
            summary,
            description: description.to_owned(),
            // In the description of POST, the parameters are in the body: OpenAPI can't say that each may be in
            // one of two places.
            parameters: match method {
                "POST" => vec![receipts::key()],
                _ => vec![self.type_parameter(), self.count_parameter(), label()],
            },
            body: (method == "POST").then(|| self.body()),
            responses,
            errors,
        }
    }

    /// Describes the numbers as lines, which only a request with `count` gets.
    fn lines(&self, format: Format) -> Content {
        let examples = self.pools.iter().map(|pool| {
            let mut line = String::new();
            format.push_line(&pool.space.number(sample(&pool.space)), &mut line);
            let example = ExampleBuilder::new().value(Some(line.into()));
            (format!("?type={}&count=1", pool.name), example)
        });
        ContentBuilder::new()
            .schema(Some(Object::with_type(Type::String)))
            .examples_from_iter(examples)
            .build()
    }

    /// Describes the body of `POST /random`, whose properties are the parameters of the URL.
    fn body(&self) -> RequestBody {
        let object = [self.type_parameter(), self.count_parameter(), label()].into_iter().fold(
            ObjectBuilder::new().additional_properties(Some(AdditionalProperties::FreeForm(false))),
            |object, parameter| match parameter.schema {
                Some(schema) => object.property(parameter.name, schema),
                None => object,
            },
        );
        let content = ContentBuilder::new().schema(Some(object)).build();
        RequestBodyBuilder::new()
            .description(Some("The parameters, unless they are in the URL."))
            .content("application/json", content)
            .build()
    }

    fn type_parameter(&self) -> Parameter {
        let names = self.pools.iter().map(|pool| pool.name.as_str());
        let default = names.clone().find(|&name| name == query::TYPE_DEFAULT);
        let ranges: Vec<_> =
            self.pools.iter().map(|pool| format!("- `{}`: {}", pool.name, pool.space)).collect();
        let (about, names) = match self.is_made_up {
            true => ("Its names are shown to callers whose token may see them.".to_owned(), None),
            false => (ranges.join("\n"), Some(names)),
        };
        ParameterBuilder::new()
            .name("type")
            .parameter_in(ParameterIn::Query)
            .required(if default.is_some() { Required::False } else { Required::True })
            .description(Some(format!("The pool to take numbers from.\n\n{about}")))
            .schema(Some(
                ObjectBuilder::new()
                    .schema_type(Type::String)
                    .enum_values(names)
                    .default(default.map(Json::from)),
            ))
            .build()
    }

    fn count_parameter(&self) -> Parameter {
        let limit = self.burst().map_or(self.count_limit, |burst| burst.min(self.count_limit));
        ParameterBuilder::new()
            .name("count")
            .parameter_in(ParameterIn::Query)
            .required(Required::False)
            .description(Some("How many numbers. Without it, one in the short form."))
            .schema(Some(
                ObjectBuilder::new()
                    .schema_type(Type::Integer)
                    .minimum(Some(1))
                    .maximum(Some(limit.get())),
            ))
            .build()
    }

    fn health(&self) -> Route {
        let example = |of: fn(usize) -> PoolHealth| {
            let pools = self.pools.iter();
            let pools = pools.map(|pool| (&pool.name, health::of_pool(&of(pool.shards))));
            health::response(pools, |_| true)
        };
        let sound = |shards| PoolHealth {
            in_rotation: shards,
            shards,
            serves: true,
            exhausted: false,
            shared: false,
            alive: true,
            trouble: None,
        };
        let exhausted = |shards| PoolHealth {
            in_rotation: 0,
            shards,
            serves: false,
            exhausted: true,
            shared: false,
            alive: true,
            trouble: None,
        };
        let refilling = |shards| PoolHealth {
            in_rotation: 0,
            shards,
            serves: false,
            exhausted: false,
            shared: false,
            alive: true,
            trouble: None,
        };
        let schema = || Ref::from_schema_name(HealthBody::name());
        let mut responses = described(
            "Every pool serves.",
            schema(),
            vec![("every shard serves".to_owned(), example(sound))],
        );
        responses.extend(described(
            "At least one pool does not serve; `reason` says why, and /status has the details.",
            schema(),
            vec![
                ("the ranges are used up".to_owned(), example(exhausted)),
                ("demand exceeds the refill rate".to_owned(), example(refilling)),
            ],
        ));
        Route {
            summary: "Whether the server can hand out numbers",
            description:
                "The status is the worst one of the pools. `degraded` means that the server \
                          serves but needs attention. Needs no token."
                    .to_owned(),
            responses,
            ..Route::default()
        }
    }

    fn ready(&self) -> Route {
        let example = |ready, serves| {
            ready::response(ready, self.pools.iter().map(|pool| (&pool.name, serves)))
        };
        let schema = || Ref::from_schema_name(ReadyBody::name());
        let mut responses = described(
            "A pool serves, or the ranges of all pools are used up.",
            schema(),
            vec![
                ("every pool serves".to_owned(), example(true, true)),
                ("all ranges are used up".to_owned(), example(true, false)),
            ],
        );
        responses.extend(described(
            "No pool serves at the moment, or one could not serve yet since the start.",
            schema(),
            vec![("no pool serves".to_owned(), example(false, false))],
        ));
        Route {
            summary: "Whether to send requests to this server",
            description: "For load balancers. The server is ready once each pool that is not used up \
                          could serve, as long as any pool serves, and when all are used up. Needs no \
                          token."
                .to_owned(),
            responses,
            ..Route::default()
        }
    }

    fn status(&self) -> Route {
        // A static example, because the figures of this server need a token.
        let (traffic, digest) = (Traffic::new(1), "ac94".repeat(16));
        let nobody = Monitor::new(traffic, Vec::new(), Arc::default(), Arc::default(), digest);
        Route {
            summary: "All figures of the pools",
            description:
                "For the page and the console. Durations are in seconds, times are in UTC, \
                          and missing values are null."
                    .to_owned(),
            responses: described(
                "The state of the server.",
                Ref::from_schema_name(status::Status::name()),
                vec![("at the start".to_owned(), status::response(&nobody, None))],
            ),
            ..Route::default()
        }
    }

    fn metrics(&self) -> Route {
        Route {
            summary: "The same figures for Prometheus",
            description: "In the text format, with a help line for each metric.".to_owned(),
            responses: described(
                "The metrics.",
                Object::with_type(Type::String),
                vec![("shortened".to_owned(), metrics::in_format(METRICS_EXAMPLE.to_owned()))],
            ),
            ..Route::default()
        }
    }

    fn reload(&self) -> Route {
        let message = "The settings were reloaded; none changed".to_owned();
        let refused =
            "server.listen can't change while the server runs: restart it, or undo the change";
        let mut errors = vec![(
            "a setting that can't change".to_owned(),
            ApiError::NotReloaded { message: refused.to_owned() },
        )];
        if self.guard.hides_pools() {
            errors.push(("a token for some pools".to_owned(), ApiError::RestrictedToken));
        }
        Route {
            summary: "Read the settings again",
            description: "Puts all changed settings into effect, or none. If a pool can't be opened again even with \
                          the settings from before, it is down until a reload opens it, and the message names it. A \
                          token that is restricted to some pools can't do this."
                .to_owned(),
            responses: described(
                "The new settings are in effect.",
                Ref::from_schema_name(Reloaded::name()),
                vec![("nothing changed".to_owned(), json(StatusCode::OK, &Reloaded { message }))],
            ),
            errors,
            ..Route::default()
        }
    }
}

fn label() -> Parameter {
    receipts::label(
        ParameterIn::Query,
        "A text to find the receipt by, such as an order number: up to 128 bytes. It is kept with the receipt \
         and never interpreted.",
    )
}

fn description() -> Route {
    let text = ObjectBuilder::new().schema_type(Type::Object).required("openapi").required("paths");
    let example = json(StatusCode::OK, &json_value!({ "openapi": "3.1.0", "paths": {} }));
    Route {
        summary: "This description",
        description: "OpenAPI 3.1, for this server as it is configured. Needs no token.".to_owned(),
        responses: described("The description.", text, vec![("shortened".to_owned(), example)]),
        ..Route::default()
    }
}

fn docs_page() -> Route {
    Route {
        summary: "This description as an interactive page",
        description: "Loads nothing from other hosts. Needs no token.".to_owned(),
        responses: vec![(StatusCode::OK, media("The page.", "text/html; charset=utf-8"))],
        ..Route::default()
    }
}

fn docs_file() -> Route {
    let file = ParameterBuilder::new()
        .name("file")
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .schema(Some(
            ObjectBuilder::new().schema_type(Type::String).enum_values(Some(docs::FILES)),
        ));
    Route {
        summary: "The files of the page",
        description: "Styles and scripts, compressed with gzip where that saves space.".to_owned(),
        parameters: vec![file.build()],
        body: None,
        responses: vec![(StatusCode::OK, media("The file.", "*/*"))],
        errors: vec![("/docs/nothing".to_owned(), ApiError::UnknownPath)],
    }
}

/// Describes a part of the page at `/`.
fn page_part(path: &str) -> Option<Route> {
    let (_, content_type, _) = page::PARTS.into_iter().find(|(part, ..)| *part == path)?;
    let (summary, description) = match path {
        "/" => ("The page that shows the pools", "Shows the figures of /status. Needs no token."),
        _ => ("A file of the page at /", "Needs no token."),
    };
    Some(Route {
        summary,
        description: description.to_owned(),
        responses: vec![(StatusCode::OK, media("The file.", content_type))],
        ..Route::default()
    })
}

/// Returns the route's group, one of [`TAGS`].
fn tag(path: &str) -> &'static str {
    match path {
        RANDOM => "numbers",
        RECEIPTS | RECEIPT => "receipts",
        RELOAD | USED => "administration",
        HEALTH | READY | STATUS | METRICS => "operations",
        _ => "pages",
    }
}

fn one(pool: &Example) -> (String, JsonResponse) {
    let number = pool.space.number(sample(&pool.space));
    (format!("?type={}", pool.name), one_of(&number, &shard(&pool.name)))
}

fn many(pool: &Example) -> (String, JsonResponse) {
    let parts = [(shard(&pool.name).into(), vec![sample(&pool.space)])];
    (format!("?type={}&count=1", pool.name), many_of(&pool.space, &parts))
}

fn shard(pool: &PoolName) -> String {
    format!("{pool}_shard_0.db")
}

/// Returns a value that looks typical: at the golden section of the range, and odd, so that its last decimal
/// is not 0 and a JSON parser keeps all decimals.
fn sample(space: &Space) -> Value {
    let far = (u128::from(space.size()) * 618 / 1_000) as i64;
    Value(((space.min().0 + far) | 1).min(space.max().0))
}

fn schemas_of<T: ToSchema>(schemas: &mut Vec<(String, RefOr<Schema>)>) {
    schemas.push((T::name().into_owned(), T::schema()));
    T::schemas(schemas);
}

/// Returns the response of a status, with one example or more.
fn described(
    description: &str,
    schema: impl Into<RefOr<Schema>>,
    examples: Vec<(String, JsonResponse)>,
) -> Vec<(StatusCode, Response)> {
    let Some((_, first)) = examples.first() else {
        return Vec::new();
    };
    let status = first.status();
    let mut response = ResponseBuilder::new().description(description);
    for (name, header) in headers(first.headers()) {
        response = response.header(name, header);
    }
    let content_type = first.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or("text/plain").to_owned();
    let examples = examples.into_iter().map(|(when, response)| {
        let value = serde_json::from_slice(response.body())
            .unwrap_or_else(|_| String::from_utf8_lossy(response.body()).into());
        (when, ExampleBuilder::new().value(Some(value)))
    });
    let content = ContentBuilder::new().schema(Some(schema)).examples_from_iter(examples);
    vec![(status, response.content(content_type, content.build()).build())]
}

/// Returns the error responses, one for each status.
fn error_responses(errors: Vec<(String, ApiError)>) -> Vec<(StatusCode, Response)> {
    let mut by_status: BTreeMap<_, (BTreeMap<Code, &str>, Vec<_>)> = BTreeMap::new();
    for (when, error) in errors {
        let (status, code, advice) = error.row();
        let (codes, examples) = by_status.entry(status).or_default();
        codes.insert(code, advice);
        examples.push((when, error.into()));
    }
    let described = by_status.into_values().flat_map(|(codes, examples)| {
        let names = codes.keys().map(|code| json_value!(code));
        let lines: Vec<_> = codes
            .iter()
            .map(|(code, advice)| {
                format!("`{}`: {advice}", json_value!(code).as_str().unwrap_or_default())
            })
            .collect();
        let code = ObjectBuilder::new().property(
            "code",
            ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names)),
        );
        let schema = AllOfBuilder::new().item(Ref::from_schema_name(ErrorBody::name())).item(code);
        described(&lines.join("\n\n"), schema, examples)
    });
    described.collect()
}

/// Returns the headers that are not common to all responses.
fn headers(headers: &HeaderMap) -> impl Iterator<Item = (String, Header)> {
    let own = headers.iter().filter(|(name, _)| HEADERS.iter().all(|(common, _)| common != name));
    own.map(|(name, value)| {
        let value = value.to_str().unwrap_or_default();
        let (type_, example) = match value.parse::<u64>() {
            Ok(number) => (Type::Integer, Json::from(number)),
            Err(_) => (Type::String, Json::from(value)),
        };
        let header =
            HeaderBuilder::new().schema(Some(Object::with_type(type_))).example(Some(example));
        (name.to_string(), header.build())
    })
}

/// Describes a response that is not JSON, without an example.
fn media(description: &str, content_type: &str) -> Response {
    let content = ContentBuilder::new().schema(Some(Object::with_type(Type::String)));
    ResponseBuilder::new().description(description).content(content_type, content.build()).build()
}
