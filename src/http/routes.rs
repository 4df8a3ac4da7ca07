//! The table of routes, which a reload replaces as a whole. Knows nothing of what the handlers do.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_TYPE, HOST, LOCATION};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, Request, StatusCode, Uri, Version};
use axum::routing::{get, head, post};
use http_body_util::{Either, Full};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Notify;

use super::guard::{self, Guard};
use super::keyed::Keeper;
use super::openapi::Offer;
use super::reads::Reads;
use super::ready::Readiness;
use super::response::{ApiError, BODY_MAX, IMPORT_MAX, json_text, only};
use super::{
    AnyResponse, App, DOCS, HEALTH, METRICS, OPENAPI, RANDOM, RANDOM_METHODS, READY, RECEIPT,
    RECEIPTS, RELOAD, RELOAD_METHODS, STATUS, TELL_METHODS, USED, description, docs, health,
    import, metrics, on_demand, page, probe, ready, receipts, reload, status,
};
use crate::config::{PoolConfig, Scope};
use crate::monitor::Monitor;
use crate::on_demand::Handle;
use crate::reload::ReloadHandle;

/// All routes of a server, and the guard that checks requests before they reach a route.
#[derive(Clone, Debug)]
pub(crate) struct Routes {
    guard: Arc<Guard>,
    /// The handler of `/random` in the mode sharded. It is called without the router, which would cost as
    /// much as the rest of the request.
    app: Option<Arc<App>>,
    router: TowerToHyperService<Router>,
}

/// The parts of the routes of the mode sharded.
#[derive(Debug)]
pub(crate) struct PoolRoutes {
    pub(crate) monitor: Arc<Monitor>,
    pub(crate) count_limit: NonZeroU32,
    pub(crate) guard: Arc<Guard>,
    pub(crate) keeper: Keeper,
    pub(crate) reloads: ReloadHandle,
}

impl Routes {
    /// Returns the routes of the mode sharded, over the pools of the monitor. `previous` are those that they
    /// replace.
    pub(crate) fn of_pools(parts: PoolRoutes, previous: Option<&Self>) -> Self {
        let PoolRoutes { monitor, count_limit, guard, keeper, reloads } = parts;
        // `Routes::handle` handles GET and POST of /random.
        let mut routes = vec![
            (RANDOM, RANDOM_METHODS, head(probe)),
            (RECEIPTS, TELL_METHODS, get(receipts::list)),
            (RECEIPT, TELL_METHODS, get(receipts::of_number)),
            (USED, "POST", post(import::used)),
            (HEALTH, TELL_METHODS, get(health)),
            (READY, TELL_METHODS, get(ready)),
            (STATUS, TELL_METHODS, get(status)),
            (METRICS, TELL_METHODS, get(metrics)),
            (RELOAD, RELOAD_METHODS, post(reload)),
            (OPENAPI, TELL_METHODS, get(description)),
            (DOCS, TELL_METHODS, get(docs::page)),
            (docs::FILE, TELL_METHODS, get(docs::file)),
        ];
        routes.extend(page::routes().map(|(path, part)| (path, TELL_METHODS, part)));
        // Generated from the routes, so that no route is missing.
        let paths: Vec<_> = routes.iter().map(|&(path, methods, _)| (path, methods)).collect();
        let pools = monitor.pools();
        let offer = Offer::new(pools.iter(), count_limit, &guard);
        let description = Bytes::from(offer.describe(&paths));
        let readiness = match previous.and_then(|routes| routes.app.as_ref()) {
            Some(app) => app.readiness.after_reload(pools.len()),
            None => Readiness::new(pools.len()),
        };
        let app = Arc::new(App {
            count_limit,
            guard: Arc::clone(&guard),
            monitor,
            keeper,
            readiness,
            names: pools.iter().map(|pool| pool.name().clone()).collect(),
            pools,
            is_outdated: AtomicBool::new(false),
            reloads,
            paths,
            reads: Arc::new(Reads::new()),
            description,
        });
        let router = routes
            .into_iter()
            .fold(Router::new(), |router, (path, methods, handler)| {
                router.route(path, only(handler, methods))
            })
            .fallback(async || ApiError::UnknownPath)
            .with_state(Arc::clone(&app));
        Self { guard, app: Some(app), router: TowerToHyperService::new(router) }
    }

    /// Returns the routes of a simpler mode.
    pub(crate) fn on_demand(
        pools: Vec<PoolConfig>,
        numbers: Arc<Handle>,
        guard: Arc<Guard>,
        reloads: ReloadHandle,
    ) -> Self {
        let router = on_demand::router(pools, numbers, Arc::clone(&guard), reloads);
        Self { guard, app: None, router: TowerToHyperService::new(router) }
    }

    /// Returns the most bytes of a body that are read, and the error for a body that is larger.
    fn body_max(&self, head: &Parts, peer: IpAddr) -> (usize, ApiError) {
        // A request whose path has a slash at its end is read like the one that it is redirected to.
        let path = head.uri.path().trim_end_matches('/');
        let is_import = path != RELOAD && guard::scope(path) == Some(Scope::Admin);
        if self.app.is_none() || !is_import {
            return (BODY_MAX, ApiError::BodyTooLarge { limit: BODY_MAX });
        }
        // A caller who may not import can't make the server hold a large body.
        match self.guard.admit(path, &head.headers, peer) {
            Ok(_) => (IMPORT_MAX, ApiError::ImportTooLarge),
            Err(refused) => (BODY_MAX, refused),
        }
    }

    /// Returns the guard.
    pub(crate) fn guard(&self) -> &Arc<Guard> {
        &self.guard
    }

    /// Notes that a reload is about to replace these routes.
    pub(crate) fn set_outdated(&self) {
        if let Some(app) = &self.app {
            app.is_outdated.store(true, Ordering::SeqCst);
        }
    }

    /// Handles a request that came from the address `peer`. `is_charged` is whether its quota was charged before.
    ///
    /// # Errors
    /// Returns the request if it failed, perhaps because a reload has stopped its pool.
    async fn handle(
        &self,
        request: Box<Request<Bytes>>,
        peer: IpAddr,
        is_charged: bool,
    ) -> Result<AnyResponse, Box<Request<Bytes>>> {
        if !has_host(&request) {
            return Ok(not_http());
        }
        if let Some(redirect) = without_slash(request.uri()) {
            return Ok(redirect);
        }
        let mut admitted = match self.guard.admit(request.uri().path(), request.headers(), peer) {
            Ok(admitted) => admitted,
            Err(error) => return Ok(error.into()),
        };
        admitted.account = admitted.account.filter(|_| !is_charged);
        let is_draw = request.uri().path() == RANDOM
            && matches!(*request.method(), Method::GET | Method::POST);
        let response = match &self.app {
            Some(app) if is_draw => {
                app.random(&request, &admitted).await.unwrap_or_else(AnyResponse::from)
            }
            _ => {
                // The request itself is kept for the routes that may replace these.
                let mut request = Request::clone(&request).map(Body::from);
                request.extensions_mut().insert(admitted);
                match self.router.call(request).await {
                    Ok(response) => response.map(Either::Right),
                    Err(never) => match never {},
                }
            }
        };
        let failed =
            matches!(response.status(), StatusCode::SERVICE_UNAVAILABLE | StatusCode::GONE);
        match failed && self.is_outdated() {
            true => Err(request),
            false => Ok(response),
        }
    }

    fn is_outdated(&self) -> bool {
        self.app.as_ref().is_some_and(|app| app.is_outdated.load(Ordering::SeqCst))
    }
}

/// The routes in effect. A reload replaces them.
#[derive(Debug)]
pub(crate) struct LiveRoutes {
    current: ArcSwap<Routes>,
    replaced: Notify,
}

impl LiveRoutes {
    pub(crate) fn new(routes: Routes) -> Self {
        Self { current: ArcSwap::from_pointee(routes), replaced: Notify::new() }
    }

    /// Returns the routes in effect.
    pub(crate) fn current(&self) -> Arc<Routes> {
        self.current.load_full()
    }

    /// Replaces the routes. Requests that found their pool stopped go on with the new ones.
    pub(crate) fn replace(&self, routes: Routes) {
        self.current.store(Arc::new(routes));
        self.replaced.notify_waiters();
    }

    /// Returns the most bytes of a body that are read, and the error for a body that is larger.
    pub(crate) fn body_max(&self, head: &Parts, peer: IpAddr) -> (usize, ApiError) {
        self.current().body_max(head, peer)
    }

    /// Handles a request that came from the address `peer`.
    pub(crate) async fn handle(&self, request: Request<Bytes>, peer: IpAddr) -> AnyResponse {
        let mut request = Box::new(request);
        let mut is_charged = false;
        loop {
            let routes = self.current();
            match routes.handle(request, peer, is_charged).await {
                Ok(response) => return response,
                Err(unhandled) => request = unhandled,
            }
            is_charged = true;
            self.replaced_since(&routes).await;
        }
    }

    async fn replaced_since(&self, routes: &Arc<Routes>) {
        loop {
            // Before the look, so that no replacement is missed.
            let replaced = self.replaced.notified();
            if !Arc::ptr_eq(&self.current.load(), routes) {
                return;
            }
            replaced.await;
        }
    }
}

/// Returns whether a request has exactly one `Host`, which HTTP/1.0 may omit (RFC 9112, section 3.2).
fn has_host(request: &Request<Bytes>) -> bool {
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => request.version() < Version::HTTP_11,
        (Some(_), second) => second.is_none(),
    }
}

/// Returns the redirect from a path with slashes at its end to the one without them.
fn without_slash(uri: &Uri) -> Option<AnyResponse> {
    let path = uri.path().trim_end_matches('/');
    let up = "../".repeat(uri.path().len() - path.len());
    let last = path.rsplit('/').next().filter(|last| !up.is_empty() && !last.is_empty())?;
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    // Relative, so that it is right behind a proxy that adds a prefix, and never leads to another host.
    let location = HeaderValue::try_from(format!("{up}{last}{query}")).ok()?;
    let mut response = json_text(StatusCode::PERMANENT_REDIRECT, String::new());
    response.headers_mut().remove(CONTENT_TYPE);
    response.headers_mut().insert(LOCATION, location);
    Some(response.map(|_| Either::Left(Full::default())))
}

/// Returns the response that hyper gives to invalid HTTP.
fn not_http() -> AnyResponse {
    let mut whole = AnyResponse::new(Either::Left(Full::default()));
    *whole.status_mut() = StatusCode::BAD_REQUEST;
    whole
}
