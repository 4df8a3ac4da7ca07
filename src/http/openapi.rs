//! What the server answers, for programs: OpenAPI 3.1, of this very server. Written from its routes,
//! its settings, its wire types and the one table of status codes; knows nothing of requests.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Value as Json, json as json_value};
use utoipa::ToSchema;
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::path::{
    Operation, OperationBuilder, Parameter, ParameterBuilder, ParameterIn,
};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{
    AllOfBuilder, ComponentsBuilder, ContentBuilder, Header, HeaderBuilder, InfoBuilder,
    LicenseBuilder, Object, ObjectBuilder, OpenApiBuilder, PathItem, PathsBuilder, Ref, RefOr,
    Required, Response, ResponseBuilder, Schema, SecurityRequirement, Tag, Type,
};

use super::answer::{Answer, BODY_MAX, Code, HEADERS, Problem, Refusal, json};
use super::guard::{self, Guard};
use super::health::{self, HealthAnswer};
use super::ready::{self, ReadyAnswer};
use super::{
    DOCS, HEALTH, METRICS, Many, OPENAPI, One, RANDOM, READY, STATUS, docs, metrics, one_of, page,
    query, status,
};
use crate::config::PoolName;
use crate::monitor::Monitor;
use crate::pool::{Health, Pool};
use crate::space::{Number, Space, Value};
use crate::traffic::Traffic;

/// What holds for every route.
const DESCRIPTION: &str = "Hands out unique random numbers, and never the same one twice.\n\n\
    Errors are JSON: `error` is a sentence for people, `code` a word for programs. Answers are JSON, \
    but for `/metrics` and the pages, and never cached, but for the files of `/docs`, which are kept \
    for an hour. What `GET` answers to, `HEAD` answers to as well. A request needs no body; up to 16 KiB of \
    one are read and ignored.";

/// Not of this server, as its status is not.
const METRICS_EXAMPLE: &str = "# HELP tombola_shard_numbers_left Numbers of the live generation that are not handed out.\n\
    # TYPE tombola_shard_numbers_left gauge\n\
    tombola_shard_numbers_left{pool=\"int\",shard=\"int_shard_0.db\"} 2500000\n";

/// The name of the security scheme.
const TOKEN: &str = "token";

/// What routes are for, in the order in which they are shown.
const TAGS: [&str; 3] = ["numbers", "operations", "pages"];

/// What a server offers.
pub(super) struct Offer<'a> {
    pub(super) pools: &'a [Arc<Pool>],
    pub(super) count_limit: NonZeroU32,
    pub(super) guard: Option<&'a Guard>,
}

/// A route's answers, in words. One that nobody described is without any, which a test finds.
#[derive(Default)]
struct Route {
    summary: &'static str,
    description: String,
    parameters: Vec<Parameter>,
    /// By status.
    answers: Vec<(StatusCode, Response)>,
    /// When each comes: what to send, as it stands behind the path, or in words.
    refusals: Vec<(String, Refusal)>,
}

impl Offer<'_> {
    /// The whole description of routes that answer to these methods.
    pub(super) fn describe(
        &self,
        routes: impl Iterator<Item = (&'static str, &'static str)>,
    ) -> String {
        let paths = routes.fold(PathsBuilder::new(), |paths, (path, methods)| {
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
            schemas_of::<Many<'_>>,
            schemas_of::<Problem>,
            schemas_of::<HealthAnswer<'_>>,
            schemas_of::<ReadyAnswer<'_>>,
            schemas_of::<status::Status>,
        ] {
            schemas_of(&mut schemas);
        }
        let mut components = ComponentsBuilder::new().schemas_from_iter(schemas);
        if self.asks_for_tokens() {
            let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(
                "`Authorization: Bearer TOKEN`. A token is for one scope, `draw` for numbers or \
                 `observe` for all else; `tombola token new` makes one.",
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
        self.guard.is_some_and(Guard::asks_for_tokens)
    }

    fn burst(&self) -> Option<NonZeroU32> {
        self.guard.and_then(Guard::burst)
    }

    fn path_item(&self, path: &str, methods: &'static str) -> PathItem {
        methods.split(", ").fold(PathItem::default(), |mut item, method| {
            let operation = Some(self.operation(path, methods, method));
            match method {
                "POST" => item.post = operation,
                "HEAD" if path == RANDOM => item.head = operation,
                // Elsewhere it is GET without a body, as ever.
                "HEAD" => {}
                _ => item.get = operation,
            }
            item
        })
    }

    fn operation(&self, path: &str, methods: &'static str, method: &str) -> Operation {
        let Route { summary, description, parameters, answers, mut refusals } = match path {
            RANDOM => self.random(method),
            HEALTH => self.health(),
            READY => self.ready(),
            STATUS => self.status(),
            METRICS => self.metrics(),
            OPENAPI => description(),
            DOCS => docs_page(),
            docs::FILE => docs_file(),
            _ => page_part(path).unwrap_or_default(),
        };
        let scope = guard::scope(path).filter(|_| self.asks_for_tokens());
        if scope.is_some() {
            refusals.push(("no token, or one that is not known".to_owned(), Refusal::Unauthorized));
            refusals.push(("a token of another scope".to_owned(), Refusal::Forbidden));
        }
        refusals.push(("DELETE".to_owned(), Refusal::WrongMethod { allowed: methods }));
        refusals.push((
            format!("a body of {} bytes", BODY_MAX + 1),
            Refusal::BodyTooLarge { limit: BODY_MAX },
        ));
        let head_too_large = ResponseBuilder::new()
            .description("The request's head is above 16 KiB or 100 lines. There is no body.");
        let operation_id = format!("{}{}", method.to_lowercase(), path)
            .replace(['/', '.'], "_")
            .replace(['{', '}'], "");
        let mut operation = OperationBuilder::new()
            .summary(Some(summary))
            .description(Some(description))
            .operation_id(Some(operation_id))
            .tag(tag(path))
            .response("431", head_too_large);
        for parameter in parameters {
            operation = operation.parameter(parameter);
        }
        for (status, mut response) in answers.into_iter().chain(refused(refusals)) {
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
        let mut answers: Vec<_> = self.pools.iter().map(|pool| one(pool)).collect();
        answers.extend(self.pools.first().map(|pool| many(pool)));
        let schema = utoipa::openapi::OneOfBuilder::new()
            .item(Ref::from_schema_name(One::name()))
            .item(Ref::from_schema_name(Many::name()));
        let answers = answered("The numbers, never handed out before.", schema, answers);

        // As the parser refuses them.
        let mut refusals: Vec<_> = ["?type=", "?count=0", "?colour=red", "?count=1&count=2"]
            .into_iter()
            .filter_map(|query| {
                let names = self.pools.iter().map(|pool| pool.name());
                let read = query::parse(names, Some(self.count_limit), Some(&query[1..]));
                Some((query.to_owned(), read.err()?))
            })
            .collect();
        if let Some(burst) = self.burst() {
            let asked = burst.get().saturating_add(1);
            if asked <= self.count_limit.get() {
                refusals.push((
                    format!("?count={asked}"),
                    Refusal::AboveBurst { asked, burst: burst.get() },
                ));
            }
            // What takes no number is not counted.
            if method != "HEAD" {
                refusals
                    .push(("the quota is used up".to_owned(), Refusal::OverQuota { seconds: 1 }));
            }
        }
        refusals.extend([
            (
                "the range is used up".to_owned(),
                Refusal::Exhausted { asked: 1, left: 0, shared: false },
            ),
            (
                "3 numbers are left".to_owned(),
                Refusal::Exhausted { asked: 5, left: 3, shared: false },
            ),
            (
                "others of the fleet may have some".to_owned(),
                Refusal::Exhausted { asked: 1, left: 0, shared: true },
            ),
            ("demand outran the disk".to_owned(), Refusal::Refilling),
        ]);
        let (summary, description) = match method {
            "HEAD" => (
                "The status that GET would have, without taking a number",
                "Whoever asks only whether there are numbers need not spend one.",
            ),
            "POST" => ("Take numbers", "The same as GET, for those to whom GET changes nothing."),
            _ => ("Take numbers", "One number, or with `count` so many, all or none."),
        };
        Route {
            summary,
            description: description.to_owned(),
            parameters: vec![self.type_parameter(), self.count_parameter()],
            answers,
            refusals,
        }
    }

    fn type_parameter(&self) -> Parameter {
        let names = self.pools.iter().map(|pool| pool.name().as_str());
        let default = names.clone().find(|&name| name == query::TYPE_DEFAULT);
        let ranges: Vec<_> = self
            .pools
            .iter()
            .map(|pool| format!("- `{}`: {}", pool.name(), pool.space()))
            .collect();
        ParameterBuilder::new()
            .name("type")
            .parameter_in(ParameterIn::Query)
            .required(if default.is_some() { Required::False } else { Required::True })
            .description(Some(format!("The pool to take from.\n\n{}", ranges.join("\n"))))
            .schema(Some(
                ObjectBuilder::new()
                    .schema_type(Type::String)
                    .enum_values(Some(names))
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
            .description(Some("How many; without it one, in the short form."))
            .schema(Some(
                ObjectBuilder::new()
                    .schema_type(Type::Integer)
                    .minimum(Some(1))
                    .maximum(Some(limit.get())),
            ))
            .build()
    }

    fn health(&self) -> Route {
        let example = |of: fn(usize) -> Health| {
            health::answer(self.pools.iter().map(|pool| {
                let shards = pool.health().shards;
                (pool.name(), health::of_pool(of(shards)))
            }))
        };
        let sound = |shards| Health {
            in_rotation: shards,
            shards,
            serves: true,
            exhausted: false,
            shared: false,
            alive: true,
            trouble: None,
        };
        let exhausted = |shards| Health {
            in_rotation: 0,
            shards,
            serves: false,
            exhausted: true,
            shared: false,
            alive: true,
            trouble: None,
        };
        let refilling = |shards| Health {
            in_rotation: 0,
            shards,
            serves: false,
            exhausted: false,
            shared: false,
            alive: true,
            trouble: None,
        };
        let schema = || Ref::from_schema_name(HealthAnswer::name());
        let mut answers = answered(
            "Every pool serves.",
            schema(),
            vec![("every shard serves".to_owned(), example(sound))],
        );
        answers.extend(answered(
            "A pool does not serve, or none does; `reason` says why.",
            schema(),
            vec![
                ("the ranges are used up".to_owned(), example(exhausted)),
                ("demand outran the disk".to_owned(), example(refilling)),
            ],
        ));
        Route {
            summary: "Whether the server can hand out numbers",
            description: "As fit as its least fit pool. `degraded` serves, and something needs \
                          looking after. Open to all."
                .to_owned(),
            answers,
            ..Route::default()
        }
    }

    fn ready(&self) -> Route {
        let example = |ready| ready::answer(self.pools.iter().map(|pool| (pool.name(), ready)));
        let schema = || Ref::from_schema_name(ReadyAnswer::name());
        let mut answers = answered(
            "Numbers can be had from every pool.",
            schema(),
            vec![("every pool has a shard in rotation".to_owned(), example(true))],
        );
        answers.extend(answered(
            "From a pool, or from all, no numbers can be had for now.",
            schema(),
            vec![("no pool has a shard in rotation".to_owned(), example(false))],
        ));
        Route {
            summary: "Whether to send requests here",
            description: "For load balancers. Open to all.".to_owned(),
            answers,
            ..Route::default()
        }
    }

    fn status(&self) -> Route {
        // Not of this server: what it has issued is for those who may observe it.
        let nobody = Monitor::new(Traffic::new(1), Vec::new(), Arc::default());
        Route {
            summary: "All that is known of the pools",
            description:
                "For pages and consoles. Durations are in seconds, times in UTC, and what is \
                          not there is null."
                    .to_owned(),
            answers: answered(
                "The state of the server.",
                Ref::from_schema_name(status::Status::name()),
                vec![("at the start".to_owned(), status::answer(&nobody))],
            ),
            ..Route::default()
        }
    }

    fn metrics(&self) -> Route {
        Route {
            summary: "The same for Prometheus",
            description: "In its text format, with a line of help for each metric.".to_owned(),
            answers: answered(
                "The metrics.",
                Object::with_type(Type::String),
                vec![("in short".to_owned(), metrics::in_format(METRICS_EXAMPLE.to_owned()))],
            ),
            ..Route::default()
        }
    }
}

fn description() -> Route {
    let text = ObjectBuilder::new().schema_type(Type::Object).required("openapi").required("paths");
    let example = json(StatusCode::OK, &json_value!({ "openapi": "3.1.0", "paths": {} }));
    Route {
        summary: "This description",
        description: "OpenAPI 3.1, of this server as it is configured. Open to all.".to_owned(),
        answers: answered("The description.", text, vec![("in short".to_owned(), example)]),
        ..Route::default()
    }
}

fn docs_page() -> Route {
    Route {
        summary: "This description, to read and to try",
        description: "A page that needs nothing from other hosts. Open to all.".to_owned(),
        answers: vec![(StatusCode::OK, media("The page.", "text/html; charset=utf-8"))],
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
        summary: "What the page is made of",
        description: "Styles and scripts, compressed with gzip where that saves something."
            .to_owned(),
        parameters: vec![file.build()],
        answers: vec![(StatusCode::OK, media("The file.", "*/*"))],
        refusals: vec![("/docs/nothing".to_owned(), Refusal::UnknownPath)],
    }
}

/// A part of the page at `/`.
fn page_part(path: &str) -> Option<Route> {
    let (_, content_type, _) = page::PARTS.into_iter().find(|(part, ..)| *part == path)?;
    let (summary, description) = match path {
        "/" => ("The pools, to look at", "A page that shows what /status says. Open to all."),
        _ => ("What the page at / is made of", "Open to all."),
    };
    Some(Route {
        summary,
        description: description.to_owned(),
        answers: vec![(StatusCode::OK, media("It is in the body.", content_type))],
        ..Route::default()
    })
}

/// One of [`TAGS`].
fn tag(path: &str) -> &'static str {
    match path {
        RANDOM => "numbers",
        HEALTH | READY | STATUS | METRICS => "operations",
        _ => "pages",
    }
}

fn one(pool: &Pool) -> (String, Answer) {
    let number = pool.space().number(sample(*pool.space()));
    (format!("?type={}", pool.name()), one_of(number, &shard(pool.name())))
}

fn many(pool: &Pool) -> (String, Answer) {
    let number: Number = pool.space().number(sample(*pool.space()));
    let shard = shard(pool.name());
    let many = Many { count: 1, numbers: vec![number], shards: BTreeMap::from([(&*shard, 1)]) };
    (format!("?type={}&count=1", pool.name()), json(StatusCode::OK, &many))
}

fn shard(pool: &PoolName) -> String {
    format!("{pool}_shard_0.db")
}

/// A value that looks like one of many: odd, so that a reader of JSON keeps all its decimals, at the
/// golden section of the range.
fn sample(space: Space) -> Value {
    let far = (u128::from(space.size()) * 618 / 1_000) as i64;
    Value(((space.min().0 + far) | 1).min(space.max().0))
}

fn schemas_of<T: ToSchema>(schemas: &mut Vec<(String, RefOr<Schema>)>) {
    schemas.push((T::name().into_owned(), T::schema()));
    T::schemas(schemas);
}

/// The answer of a status, with one example or more.
fn answered(
    description: &str,
    schema: impl Into<RefOr<Schema>>,
    examples: Vec<(String, Answer)>,
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
    let examples = examples.into_iter().map(|(when, answer)| {
        let value = serde_json::from_slice(answer.body())
            .unwrap_or_else(|_| String::from_utf8_lossy(answer.body()).into());
        (when, ExampleBuilder::new().value(Some(value)))
    });
    let content = ContentBuilder::new().schema(Some(schema)).examples_from_iter(examples);
    vec![(status, response.content(content_type, content.build()).build())]
}

/// The refusals of each status.
fn refused(refusals: Vec<(String, Refusal)>) -> Vec<(StatusCode, Response)> {
    let mut by_status: BTreeMap<_, (BTreeMap<Code, &str>, Vec<_>)> = BTreeMap::new();
    for (when, refusal) in refusals {
        let (status, code, advice) = refusal.row();
        let (codes, examples) = by_status.entry(status).or_default();
        codes.insert(code, advice);
        examples.push((when, refusal.into()));
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
        let schema = AllOfBuilder::new().item(Ref::from_schema_name(Problem::name())).item(code);
        answered(&lines.join("\n\n"), schema, examples)
    });
    described.collect()
}

/// Those that not every answer has.
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

/// What is not JSON: there is no example of a page.
fn media(description: &str, content_type: &str) -> Response {
    let content = ContentBuilder::new().schema(Some(Object::with_type(Type::String)));
    ResponseBuilder::new().description(description).content(content_type, content.build()).build()
}
