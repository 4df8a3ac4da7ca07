//! The page at `/`, in Chromium: what visitors see and do. If Chromium or its driver is missing (Debian
//! packages chromium and chromium-driver), these tests report that and pass, except in `.ci/run`; the first
//! test needs neither.
//!
//! Screenshots of the page are kept in `target/tmp/page/`: light, dark, narrow, stale, locked, depleted, starter,
//! receipt, many, many_narrow.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};
use support::{
    Config, Failure, One, Process, Server, Site, Token, eventually, skipped, with_tokens,
};
use thirtyfour::prelude::{ElementQueryable, ElementWaitable};
use thirtyfour::{
    By, ChromiumLikeCapabilities, DesiredCapabilities, Key, LoggingPrefsLogLevel, WebDriver,
    WebElement,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const PARTS: [(&str, &str); 7] = [
    ("/", "text/html; charset=utf-8"),
    ("/page.css", "text/css; charset=utf-8"),
    ("/page.js", "text/javascript; charset=utf-8"),
    ("/charts.js", "text/javascript; charset=utf-8"),
    ("/dom.js", "text/javascript; charset=utf-8"),
    ("/format.js", "text/javascript; charset=utf-8"),
    ("/page.svg", "image/svg+xml"),
];

/// Returns a config with two shards so small that they visibly drain.
fn config() -> Config {
    Config::new().pool("int", 1, 100_000, 2, 1_000)
}

/// A browser for one test, and its driver.
struct Browser {
    driver: WebDriver,
    // Declared after the session, which has to be dropped first.
    _process: Process,
}

impl Browser {
    /// Starts a browser. Returns `None` if there is none.
    async fn start() -> Option<Self> {
        for program in ["chromium", "chromedriver"] {
            if let Err(error) = Command::new(program).arg("--version").output() {
                assert_eq!(error.kind(), ErrorKind::NotFound, "{program}: {error}");
                skipped(&format!(
                    "{program} is missing (Debian packages chromium, chromium-driver)"
                ));
                return None;
            }
        }
        let mut command = Command::new("chromedriver");
        command.arg("--port=0");
        let process = Process::spawn(command);
        let line = process.line("started successfully on port ").await;
        let port = line.trim_end_matches('.').rsplit(' ').next().unwrap();
        let mut wishes = DesiredCapabilities::chrome();
        // A container has no sandbox for root, and its /dev/shm is small.
        for flag in ["--no-sandbox", "--disable-dev-shm-usage"] {
            wishes.add_arg(flag).unwrap();
        }
        // A name whose owner points it to this machine.
        wishes.add_arg("--host-resolver-rules=MAP evil.test 127.0.0.1").unwrap();
        for flag in ["--headless=new", "--hide-scrollbars", "--window-size=1280,800"] {
            wishes.add_arg(flag).unwrap();
        }
        wishes.set_browser_log_level(LoggingPrefsLogLevel::All).unwrap();
        let driver = WebDriver::new(format!("http://127.0.0.1:{port}"), wishes).await.unwrap();
        Some(Self { driver, _process: process })
    }

    async fn open(&self, address: &str) {
        self.driver.goto(format!("http://{address}/")).await.unwrap();
    }

    /// Runs the body of a JavaScript function and returns its result.
    async fn run(&self, script: &str) -> Value {
        self.driver.execute(script, []).await.unwrap().json().clone()
    }

    /// Returns the visible text of the first element that `selector` finds; empty if there is none.
    async fn text(&self, selector: &str) -> String {
        let script = format!(
            "const node = document.querySelector({selector:?}); \
             return node?.checkVisibility() ? node.innerText : ''"
        );
        self.run(&script).await.as_str().unwrap().to_owned()
    }

    /// Waits until the text there contains `words`.
    async fn reads(&self, selector: &str, words: &str) {
        let what = format!("{words:?} at {selector}");
        eventually(&what, async || self.text(selector).await.contains(words).then_some(())).await;
    }

    /// Waits until the text there is exactly `words`. This is for figures: "10" contains "0".
    async fn reads_just(&self, selector: &str, words: &str) {
        let what = format!("just {words:?} at {selector}");
        eventually(&what, async || (self.text(selector).await.trim() == words).then_some(())).await;
    }

    /// Waits until a JavaScript expression is true.
    async fn holds(&self, expression: &str) {
        let script = format!("return Boolean({expression})");
        eventually(expression, async || self.run(&script).await.as_bool().unwrap().then_some(()))
            .await;
    }

    /// Waits until the element is visible, and returns it.
    async fn element(&self, selector: &str) -> WebElement {
        let element = self.driver.query(By::Css(selector)).first().await.unwrap();
        element.wait_until().displayed().await.unwrap();
        element
    }

    async fn click(&self, selector: &str) {
        self.element(selector).await.click().await.unwrap();
    }

    async fn enter(&self, selector: &str, text: &str) {
        self.element(selector).await.send_keys(text + Key::Enter).await.unwrap();
    }

    /// Presses a key in the element that has the focus.
    async fn press(&self, key: Key) {
        self.driver.action_chain().send_keys(key).perform().await.unwrap();
    }

    async fn devtools(&self, command: &str, parameters: Value) -> Value {
        self.driver.cdp().send_raw(command, parameters).await.unwrap()
    }

    async fn resize(&self, width: u32) {
        let size = json!({"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": false});
        self.devtools("Emulation.setDeviceMetricsOverride", size).await;
        self.holds(&format!("innerWidth === {width}")).await;
    }

    /// Taps a point of the window with a finger.
    async fn tap(&self, x: f64, y: f64) {
        self.devtools("Emulation.setTouchEmulationEnabled", json!({"enabled": true})).await;
        for (kind, points) in [("touchStart", json!([{"x": x, "y": y}])), ("touchEnd", json!([]))] {
            let event = json!({"type": kind, "touchPoints": points});
            self.devtools("Input.dispatchTouchEvent", event).await;
        }
    }

    /// Gives the page a history of this many points, from now on, in place of the server's. Its rates end at 159, p50
    /// at 159 µs and p99 at 559 µs, and grow by one from point to point.
    async fn show_history(&self, points: u32) {
        let script = format!(
            "return (async () => {{ \
               const status = await (await fetch('status')).json(); \
               const grow = (last, unit) => Array.from( \
                 {{ length: {points} }}, (_, at) => (last - {points} + 1 + at) * unit); \
               Object.assign(status.history, {{ numbers_per_second: grow(159, 1), \
                 p50_seconds: grow(159, 1e-6), p99_seconds: grow(559, 1e-6) }}); \
               status.version = 'history of {points} points'; \
               window.fetch = async () => new Response(JSON.stringify(status)); }})()"
        );
        self.run(&script).await;
        self.reads("#build", &format!("history of {points} points")).await;
    }

    /// Sets a preference of the visitor, such as the colour scheme.
    async fn prefer(&self, feature: &str, value: &str) {
        let features = json!({"features": [{"name": feature, "value": value}]});
        self.devtools("Emulation.setEmulatedMedia", features).await;
    }

    /// Saves a screenshot of the whole page.
    async fn picture(&self, name: &str) {
        let wishes = json!({"format": "png", "captureBeyondViewport": true});
        let answer = self.devtools("Page.captureScreenshot", wishes).await;
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
        fs::create_dir_all(&folder).unwrap();
        let bytes = thirtyfour::support::base64_decode(answer["data"].as_str().unwrap()).unwrap();
        fs::write(folder.join(name).with_extension("png"), bytes).unwrap();
    }

    /// Ends the session. The page must have loaded nothing from other hosts, and the console has to be empty,
    /// except for requests that failed with one of the texts in `failures`.
    async fn finish(self, failures: &[&str]) {
        let elsewhere = "return performance.getEntriesByType('resource').map(entry => entry.name) \
                         .filter(name => new URL(name).origin !== location.origin)";
        assert_eq!(self.run(elsewhere).await, json!([]));
        let loaded = "return performance.getEntriesByType('resource').length";
        assert!(self.run(loaded).await.as_u64().unwrap() >= 3, "the page did not load its parts");
        for entry in self.driver.browser_log().await.unwrap() {
            let known = failures.iter().any(|words| entry.message.contains(words));
            let failed = entry.source.as_deref() == Some("network") && known;
            assert!(failed, "unexpected in the console: {entry:?}");
        }
        self.driver.quit().await.unwrap();
    }
}

/// Forwards connections to a server, as long as there is one.
struct Passage {
    address: String,
    server: watch::Sender<Option<String>>,
}

impl Passage {
    async fn open(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, receiver) = watch::channel(Some(server.address().to_owned()));
        tokio::spawn(async move {
            loop {
                let (mut visitor, _) = listener.accept().await.unwrap();
                let Some(server) = receiver.borrow().clone() else { continue };
                tokio::spawn(async move {
                    let mut server = TcpStream::connect(server).await?;
                    tokio::io::copy_bidirectional(&mut visitor, &mut server).await
                });
            }
        });
        Self { address, server: sender }
    }
}

/// Returns when a server began to serve, according to its events.
async fn started_at(server: &Server) -> String {
    let status: Value = server.get("/status").await.parse();
    let events = status["events"].as_array().unwrap();
    let started = events.iter().find(|event| event["kind"] == "started").unwrap();
    started["at"].as_str().unwrap().to_owned()
}

/// Returns an expression that is true if exactly one of the listed events is a start, at this time, and none
/// is older.
fn starts_are(at: &str) -> String {
    format!(
        "(() => {{ const rows = [...document.querySelectorAll('#events li')]; \
           const starts = rows.filter(row => row.querySelector('[data-is=started]')); \
           return starts.length === 1 && starts[0].querySelector('time').dateTime === '{at}' \
             && rows.every(row => row.querySelector('time').dateTime >= '{at}'); }})()"
    )
}

/// Returns the response that the page shows after drawing a number.
async fn drawn(browser: &Browser) -> String {
    browser.holds("!document.querySelector('#answer').hidden").await;
    browser.text("#answer").await
}

/// Story: the page was sent with the lax headers of an API response, and another site framed it and clicked.
/// Or one of its parts required a token, and the page stayed empty.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_open_and_has_no_door_to_elsewhere() {
    let observe = Token::new("monitor", "observe").await;
    let site = Site::new(&with_tokens(config(), &[&observe]));
    let server = site.start().await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    for (path, content_type) in PARTS {
        let url = format!("http://{}{path}", server.address());
        for method in [Method::GET, Method::HEAD] {
            let response = http.request(method.clone(), &url).send().await.unwrap();
            assert_eq!(response.status(), 200, "{method} {path}");
            for (name, value) in [
                ("content-type", content_type),
                ("cache-control", "no-store"),
                ("x-content-type-options", "nosniff"),
                ("referrer-policy", "no-referrer"),
                ("x-frame-options", "DENY"),
                (
                    "content-security-policy",
                    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                ),
            ] {
                let found: Vec<_> = response.headers().get_all(name).iter().collect();
                assert_eq!(found, [value], "{name} of {path}");
            }
            let text = response.text().await.unwrap();
            assert_eq!(text.is_empty(), method == Method::HEAD, "{path}");
            let text = text.replace("http://www.w3.org/2000/svg", "");
            for way in ["http:", "https:", "\"//", "url(", "innerHTML", "insertAdjacentHTML"] {
                assert!(!text.contains(way), "{way} in {path}");
            }
            // All that it sends are requests with `fetch`, whose method is GET unless another one is named.
            for way in ["method", "XMLHttpRequest", "sendBeacon", "WebSocket"] {
                assert!(!text.contains(way), "{way} in {path}");
            }
        }
        let answer = server.send(Method::POST, path).await;
        answer.assert_status(405);
        assert_eq!(answer.header("allow"), Some("GET, HEAD"), "{path}");
    }
    for path in ["/status", "/page", "/page.html", "//"] {
        let answer = server.get(path).await;
        answer.assert_status(401);
        assert_eq!(answer.parse::<Failure>().code, "unauthorized", "{path}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn levels_move_while_numbers_are_drawn() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    browser.open(server.address()).await;
    browser.reads("#state", "all pools serve").await;
    browser.reads_just(".pool .name", "int").await;
    browser.reads_just(".pool .range", "1 to 100,000").await;
    browser.reads_just(".pool .pooled", "2,000").await;
    browser.reads_just(".shard .left", "1,000 of 1,000 left").await;
    browser.reads_just("#rate", "0").await;

    for _ in 0..12 {
        server.take("int", Some(100)).await;
    }
    browser.reads_just(".pool .issued", "1,200").await;
    // The text, the meter and the width of each bar agree. A shard may have been replaced, and be full again.
    browser
        .holds(
            "(() => { const bars = [...document.querySelectorAll('.level')]; \
             const left = bar => Number(bar.ariaValueNow) / Number(bar.ariaValueMax); \
             return bars.some(bar => left(bar) < 1) && bars.every(bar => { \
               const scale = new DOMMatrix(getComputedStyle(bar.firstElementChild).transform).a; \
               return Math.abs(scale - left(bar)) < 0.001; }); })()",
        )
        .await;
    browser.holds("Number(document.querySelector('#rate').innerText.replace(',', '')) > 0").await;
    browser.reads_just(".pool .chance", "1 in 83").await;
    browser.reads(".pool .share", "1.2 % of the range is issued").await;
    browser.holds("document.querySelectorAll('#rate-chart .line').length > 0").await;
    browser.holds("document.querySelectorAll('#latency-chart .line').length > 1").await;
    browser.holds("document.querySelectorAll('#events li').length > 0").await;
    browser.holds("document.title.startsWith('tombola: ')").await;
    browser.finish(&[]).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_depleted_pool_shows() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    site.block_refills("int", 2).await;
    for _ in 0..20 {
        server.take("int", Some(100)).await;
    }
    browser.open(server.address()).await;
    browser.reads("#state", "int does not serve").await;
    browser.reads(".pool .state", "does not serve: ").await;
    browser.reads(".shard .state", "depleted").await;
    browser.reads_just(".shard .left", "0 of 1,000 left").await;
    browser.reads("#events", "depleted").await;
    browser.click("#draw-one").await;
    assert!(drawn(&browser).await.contains(support::REFILLING));
    browser.reads("#outcome", "No number was drawn. Ask again in 1 second. Status 503").await;
    browser.picture("depleted").await;

    site.unblock_refills("int", 2);
    browser.reads("#state", "all pools serve").await;
    browser.reads(".shard .state", "in rotation").await;
    browser.finish(&["503"]).await;
    server.stop().await;
}

/// Story: receipts could not be saved, and screen readers did not announce it.
#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_that_cannot_be_saved_is_listed_and_announced() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    browser.open(server.address()).await;
    browser.reads("#events", "The server started").await;
    // A folder takes the path where the first receipt creates its file.
    fs::create_dir(site.file("receipts.db.tmp")).unwrap();
    let answer = server.get("/random?label=order-17").await;
    answer.assert_status(503);
    assert_eq!(answer.parse::<Failure>().code, "receipt_not_saved");
    browser.reads("#events .kind[data-is=receipts_failed]", "receipts failed").await;
    browser.reads("#events", "Receipts can't be saved: ").await;
    let announced = "document.querySelector('#announce').textContent.startsWith('Receipts can')";
    browser.holds(announced).await;

    fs::remove_dir(site.file("receipts.db.tmp")).unwrap();
    server.get("/random?label=order-17").await.assert_status(200);
    browser.finish(&[]).await;
    server.stop().await;
}

/// Story: the bar of a new pool was all but empty, and nothing said that its shards were still being filled.
#[tokio::test(flavor = "multi_thread")]
async fn a_starter_supply_is_called_one() {
    let Some(browser) = Browser::start().await else { return };
    // The first build of a pool whose generations are large makes a small one.
    let site = Site::new(&Config::new().pool("int", 1, 1_000_000_000, 2, 2_500_000));
    let server = site.start().await;
    browser.open(server.address()).await;
    browser.reads(".shard .left", "Starter supply: ").await;
    browser.reads(".shard .left", " left. A full generation has 2,500,000").await;
    // The bar is relative to the supply, of which nothing was taken.
    browser.holds("document.querySelector('.level').ariaValueNow === document.querySelector('.level').ariaValueMax").await;
    browser.picture("starter").await;
    // Without a response, no figure looks current.
    browser
        .holds("getComputedStyle(document.querySelector('.level i')).backgroundImage !== 'none'")
        .await;
    server.stop().await;
    browser.reads("#state", "no response").await;
    browser
        .holds("getComputedStyle(document.querySelector('.level i')).backgroundImage === 'none'")
        .await;
    browser.finish(&["net::ERR_"]).await;
}

/// Story: a range came to its end, and the page called its last numbers a starter supply.
#[tokio::test(flavor = "multi_thread")]
async fn other_small_generations_are_not_called_starters() {
    let Some(browser) = Browser::start().await else { return };
    let pools = Config::new()
        .pool("ending", 1, 15, 1, 10)
        .pool("imported", 1, 100_000, 1, 1_000)
        .pool("uneven", 1, 1_000, 3, 334);
    let site = Site::new(&pools);
    site.fill().await;
    let server = site.start().await;
    // The second generation has the last 5 numbers of the range.
    server.take("ending", Some(10)).await;
    server.take("ending", Some(1)).await;
    // The second generation loses a number to an import while it waits for its turn.
    server.take("imported", Some(600)).await;
    eventually("a standby", async || {
        let status: Value = server.get("/status").await.parse();
        (status["pools"]["imported"]["shards"][0]["standby"] == true).then_some(())
    })
    .await;
    let next = site.file("imported_shard_0.db.next");
    let values: Vec<i64> = support::column(&next, "SELECT value FROM numbers LIMIT 1");
    let (target, body) = ("/pools/imported/used", format!("{}\n", values[0]));
    let headers = [("content-type", "text/plain")];
    let answer = server.client().send_body(Method::POST, target, &headers, &body).await.unwrap();
    answer.assert_status(200);
    server.take("imported", Some(400)).await;
    server.take("imported", Some(1)).await;

    browser.open(server.address()).await;
    for (shard, left) in [
        (".pool:nth-child(1) .shard", "4 of 5 left. A full generation has 10"),
        (".pool:nth-child(2) .shard", "998 of 999 left. A full generation has 1,000"),
        (".pool:nth-child(3) .shard:last-child", "332 of 332 left. A full generation has 334"),
    ] {
        browser.reads_just(&format!("{shard} .left"), left).await;
    }
    browser.holds("document.querySelectorAll('.level[data-starter=true]').length === 0").await;
    browser.finish(&[]).await;
    server.stop().await;
}

/// Story: what the page called the median answer was a time that no caller ever saw.
#[tokio::test(flavor = "multi_thread")]
async fn charts_tell_the_value_at_the_pointer_and_at_the_keyboard() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    browser.open(server.address()).await;
    server.take("int", Some(100)).await;
    browser.reads("#now", "Server time p50").await;
    browser.reads("#charts", "Server time per request, without the network").await;
    assert!(!server.get("/openapi.json").await.body.contains("response times"));
    browser.holds("document.querySelectorAll('#rate-chart .dot').length > 0").await;
    let hint = "Point at the chart or use the arrow keys to read a value.";
    browser.reads_just("#rate-chart + .note", hint).await;

    // The newest of 60 points is 40 pixels from the right, and the oldest 60 pixels from the left.
    browser.show_history(60).await;
    let chart = browser.element("#rate-chart").await;
    let width = browser.run("return document.querySelector('#rate-chart').clientWidth").await;
    let width = width.as_f64().unwrap();
    let from_right = |back: f64| 40.0 + back / 59.0 * (width - 100.0);
    let from_middle = (width / 2.0 - from_right(29.0)).round() as i64;
    browser
        .driver
        .action_chain()
        .move_to_element_with_offset(&chart, from_middle, 0)
        .perform()
        .await
        .unwrap();
    browser.reads("#rate-chart + .note", ": 130 per second").await;
    browser.holds("document.querySelectorAll('#rate-chart .chosen').length === 1").await;
    let said = "document.querySelector('#rate-chart').ariaValueText.endsWith(': 130 per second')";
    browser.holds(said).await;

    browser.run("document.querySelector('#latency-chart').focus()").await;
    browser.reads_just("#latency-chart + .note", hint).await;
    browser.press(Key::End).await;
    browser.reads("#latency-chart + .note", ": p50 159 µs, p99 559 µs").await;
    browser.holds("document.querySelector('#latency-chart').ariaValueNow === '0'").await;
    browser.holds("document.querySelector('#latency-chart').ariaValueMin === '-295'").await;
    browser.press(Key::Left).await;
    browser.reads("#latency-chart + .note", ": p50 158 µs, p99 558 µs").await;
    browser.holds("document.querySelector('#latency-chart').ariaValueNow === '-5'").await;
    browser.press(Key::Escape).await;
    browser.reads_just("#latency-chart + .note", hint).await;

    // The value at a finger stays when it is lifted.
    let corner = "const chart = document.querySelector('#latency-chart'); \
                  chart.scrollIntoView({ block: 'center', behavior: 'instant' }); \
                  const { right, top } = chart.getBoundingClientRect(); return [right, top]";
    let corner = browser.run(corner).await;
    let [right, top] = [0, 1].map(|index| corner[index].as_f64().unwrap());
    browser.tap(right - from_right(10.0), top + 50.0).await;
    browser.reads("#latency-chart + .note", ": p50 149 µs, p99 549 µs").await;
    browser.run("document.querySelector('#latency-chart').blur()").await;
    browser.reads_just("#latency-chart + .note", hint).await;

    browser.show_history(0).await;
    for end in ["ariaValueMin", "ariaValueNow", "ariaValueMax"] {
        browser.holds(&format!("document.querySelector('#rate-chart').{end} === '0'")).await;
    }
    browser.finish(&[]).await;
    server.stop().await;
}

/// Story: a customer asked who had got a code, and the operator had no shell on the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_is_found_with_a_token_that_the_page_forgets() {
    let Some(browser) = Browser::start().await else { return };
    let observe = Token::new("monitor", "observe").await;
    let draw = Token::new("shop", "draw").await;
    let audit = Token::new("office", "audit").await;
    let site = Site::new(&with_tokens(config(), &[&observe, &draw, &audit]));
    site.fill().await;
    let server = site.start().await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let draw_one = async |label: &str, key: Option<&str>| {
        let url = format!("http://{}/random?label={label}", server.address());
        let mut request = http.post(url).header("Authorization", draw.header());
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let answer = request.send().await.unwrap();
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        body["number"].to_string()
    };

    browser.open(server.address()).await;
    browser.enter("#observe-token", &observe.text).await;
    browser.reads_just("#receipt-rate", "0").await;
    // Five receipts, three of them with a key, and one repeated response.
    let number = draw_one("order-17", Some("order-17")).await;
    assert_eq!(draw_one("order-17", Some("order-17")).await, number);
    for key in [Some("order-18"), Some("order-19"), None, None] {
        draw_one("order-18", key).await;
    }
    browser.holds("Number(document.querySelector('#receipt-rate').innerText) > 0").await;
    browser.reads_just("#receipt-count", "5").await;
    browser.reads_just("#keyed", "3").await;
    browser.reads_just("#replayed", "1").await;
    browser.reads_just("#refused", "0").await;

    browser.enter("#number", &number).await;
    browser.reads("#lookup-ask .why", "To find a receipt, a token is needed.").await;
    browser.enter("#lookup-token", &observe.text).await;
    browser.reads("#lookup-ask .why[data-wrong]", "its scope is not lookup").await;
    browser.enter("#lookup-token", &audit.text).await;
    browser.reads("#found", "Receipt 1: drawn at ").await;
    browser.reads("#found", " by shop, labelled order-17.").await;
    browser.reads("#receipt", &format!("\"numbers\":[{number}]")).await;
    browser.picture("receipt").await;
    browser.run("document.querySelector('#number').value = ''").await;
    browser.enter("#number", "100000").await;
    browser.reads("#found", "No receipt that you may see has 100000 of the pool int.").await;

    let kept = "return JSON.stringify(sessionStorage) + JSON.stringify(localStorage) + \
                document.cookie + document.documentElement.outerHTML";
    let kept = browser.run(kept).await;
    assert!(!kept.as_str().unwrap().contains(&audit.text), "{kept}");
    browser.open(server.address()).await;
    browser.enter("#number", &number).await;
    browser.reads("#lookup-ask .why", "To find a receipt, a token is needed.").await;
    browser.enter("#lookup-token", &audit.text).await;
    browser.reads("#found", "Receipt 1: drawn at ").await;
    browser.click("#forget").await;
    browser.enter("#number", "").await;
    browser.reads("#lookup-ask .why", "To find a receipt, a token is needed.").await;
    browser.finish(&["401", "403", "404"]).await;
    server.stop().await;
}

/// Story: an alphabet had a space, and the page looked for the codes that ended with one without it.
#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_is_found_by_a_code_of_any_characters() {
    let Some(browser) = Browser::start().await else { return };
    let observe = Token::new("monitor", "observe").await;
    let draw = Token::new("shop", "draw").await;
    let audit = Token::new("office", "audit").await;
    // All codes are drawn: four, with a space or a slash at each end.
    let pools = config()
        .set("pools.voucher.pattern", "'#%#'")
        .set("pools.voucher.alphabet", "' /'")
        .set("pools.voucher.shards", 1)
        .set("pools.voucher.shard_size", 4)
        .set("receipts.lookups_per_second", 1_000);
    let site = Site::new(&with_tokens(pools, &[&observe, &draw, &audit]));
    site.fill().await;
    let server = site.start().await;
    let (header, mut drawn) = (draw.header(), Vec::new());
    for (order, pool) in ["int"].into_iter().chain(["voucher"; 4]).enumerate() {
        let target = format!("/random?type={pool}&label=order-{order}");
        let headers = [("authorization", &*header)];
        let answer = server.client().send_with(Method::POST, &target, &headers).await.unwrap();
        let body: Value = answer.parse();
        let text = match body["code"].as_str() {
            Some(code) => code.to_owned(),
            // A number that is pasted may have spaces around it.
            None => format!(" {} ", body["number"]),
        };
        drawn.push((pool, text));
    }

    browser.open(server.address()).await;
    browser.enter("#number", "0").await;
    browser.enter("#lookup-token", &audit.text).await;
    browser.reads("#found", "No receipt that you may see has 0 of the pool int.").await;
    // Without a token for /status, the page does not know which pools are of codes.
    for knows_pools in [false, true] {
        if knows_pools {
            browser.enter("#observe-token", &observe.text).await;
            browser.reads("#state", "voucher").await;
        }
        for (order, (pool, text)) in drawn.iter().enumerate() {
            let choose = format!(
                "document.querySelector('#lookup-pool').value = '{pool}'; \
                 document.querySelector('#number').value = ''"
            );
            browser.run(&choose).await;
            browser.enter("#number", text).await;
            browser.reads("#found", &format!(" by shop, labelled order-{order}.")).await;
        }
    }
    browser.finish(&["401", "404", "503"]).await;
    server.stop().await;
}

/// Story: the page of a server with a pool for each campaign was forty screens long.
#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_pools_are_folded_and_can_be_filtered() {
    let Some(browser) = Browser::start().await else { return };
    let pools = (0..199).fold(config(), |config, index| {
        config.pool(&format!("campaign_{index:03}"), 1, 1_000_000, 1, 100)
    });
    let site = Site::new(&pools);
    let server = site.start().await;
    browser.open(server.address()).await;
    browser.reads_just("#filtered", "200 of 200 pools").await;
    browser.reads("#state", "all pools serve").await;
    // Each pool is a line, and the page stays within a few screens of them.
    browser.holds("document.querySelectorAll('.pool').length === 200").await;
    browser.holds("document.querySelectorAll('.pool[open], .pool .shard').length === 0").await;
    browser.reads(".pool .brief", " ready, 0 per second").await;
    // `/random` without a type takes this one.
    browser.holds("document.querySelector('#pool').value === 'int'").await;
    assert!(server.get("/random").await.body.contains("int_shard_"));

    browser.element("#filter-text").await.send_keys("gn_12").await.unwrap();
    browser.reads_just("#filtered", "10 of 200 pools").await;
    browser.holds("document.querySelectorAll('.pool').length === 10").await;
    browser.click(".pool .head").await;
    browser.reads(".pool .shard .name", "campaign_120_shard_0.db").await;
    // A card that was opened stays open when the figures change.
    browser.holds("document.querySelectorAll('.pool[open]').length === 1").await;
    let filter = async |text: &str| {
        let script = format!(
            "const text = document.querySelector('#filter-text'); text.value = '{text}'; \
             text.dispatchEvent(new Event('input'))"
        );
        browser.run(&script).await;
    };
    site.block_refills("campaign_007", 1).await;
    server.take("campaign_007", Some(100)).await;
    filter("depleted").await;
    browser.reads_just("#filtered", "1 of 200 pools").await;
    browser.reads_just(".pool .name", "campaign_007").await;
    filter("serves").await;
    browser.reads_just("#filtered", "199 of 200 pools").await;
    site.unblock_refills("campaign_007", 1);
    browser.reads_just("#filtered", "200 of 200 pools").await;
    filter("").await;
    browser.reads_just("#filtered", "200 of 200 pools").await;
    let height = browser.run("return document.documentElement.scrollHeight").await;
    assert!(height.as_u64().unwrap() < 6_000, "the page is {height} pixels high");
    browser.picture("many").await;
    browser.resize(360).await;
    let scroll = "return document.documentElement.scrollWidth";
    assert_eq!(browser.run(scroll).await, json!(360));
    browser.picture("many_narrow").await;
    browser.finish(&[]).await;
    server.stop().await;
}

/// Story: a visitor looked for the description of the API, and the page did not name it.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_leads_to_the_description_and_lists_imports_and_reloads() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let post = async |path: &str| {
        let request = http.post(format!("http://{}{path}", server.address()));
        let request = request.header("Content-Type", "text/plain").body("99999\n");
        assert_eq!(request.send().await.unwrap().status(), 200, "{path}");
    };
    browser.open(server.address()).await;
    post("/pools/int/used").await;
    browser.reads("#events .kind[data-is=imported]", "imported").await;
    let answer = http.post(format!("http://{}/reload", server.address())).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    browser.reads("#events .kind[data-is=reloaded]", "reloaded").await;
    site.configure(&config().set("server.drain_ms", 77));
    let answer = http.post(format!("http://{}/reload", server.address())).send().await.unwrap();
    assert_eq!(answer.status(), 422);
    let refused = "The settings were not reloaded: server.drain_ms can't change";
    browser.reads("#events", refused).await;

    browser.click("#api").await;
    browser.reads("#swagger-ui", "/random").await;
    browser.driver.goto(format!("http://{}/docs/", server.address())).await.unwrap();
    browser.holds("location.pathname === '/docs'").await;
    browser.reads("#swagger-ui", "/random").await;
    browser.driver.quit().await.unwrap();
    server.stop().await;
}

/// Story: the page of a similar server broke as soon as a key was configured.
#[tokio::test(flavor = "multi_thread")]
async fn with_tokens_the_page_asks_for_one_and_works_with_it() {
    let Some(browser) = Browser::start().await else { return };
    let observe = Token::new("monitor", "observe").await;
    let draw = Token::new("shop", "draw").await;
    let site = Site::new(&with_tokens(config(), &[&observe, &draw]));
    site.fill().await;
    let server = site.start().await;
    browser.open(server.address()).await;
    browser.reads("#observe .why", "To see what this server does, a token is needed.").await;
    browser.picture("locked").await;
    for (token, words) in [
        ("tombola_nonsense", "does not know that token"),
        ("tombola nonsense ü", "one word of plain letters"),
        (&*draw.text, "its scope is not observe"),
    ] {
        browser.enter("#observe-token", token).await;
        browser.reads("#observe .why[data-wrong]", words).await;
        assert_eq!(browser.text("#now").await, "", "the status is shown without a token");
    }
    browser.enter("#observe-token", &observe.text).await;
    browser.reads_just(".pool .pooled", "2,000").await;
    browser.holds("document.querySelector('#observe').hidden").await;

    browser.click("#draw-one").await;
    browser.reads("#draw-ask .why", "To draw here, a token is needed.").await;
    browser.enter("#draw-token", "tombola_nonsense").await;
    browser.reads("#draw-ask .why[data-wrong]", "does not know that token").await;
    browser.enter("#draw-token", &draw.text).await;
    drawn(&browser).await;
    assert_eq!(browser.run("return document.activeElement.id").await, json!("draw-one"));
    browser.reads("#curl", "curl -H \"Authorization: Bearer $TOKEN\" 'http://127.0.0.1:").await;

    // The tokens are not in the page, nor in any address.
    let seen = "return document.documentElement.outerHTML + location.href + JSON.stringify( \
                performance.getEntriesByType('resource')) + document.cookie + \
                JSON.stringify(localStorage) + \
                [...document.querySelectorAll('input')].map(input => input.value)";
    let seen = browser.run(seen).await;
    for token in [&observe, &draw] {
        assert!(!seen.as_str().unwrap().contains(&token.text), "{seen}");
    }

    // The token survives a reload, in this tab only.
    browser.open(server.address()).await;
    browser.reads_just(".pool .issued", "1").await;
    let first = browser.driver.window().await.unwrap();
    for _ in 0..2 {
        let tab = browser.driver.new_tab().await.unwrap();
        browser.driver.switch_to_window(tab).await.unwrap();
        browser.open(server.address()).await;
        browser.reads("#observe .why", "To see what this server does, a token is needed.").await;
        browser.enter("#observe-token", &observe.text).await;
        browser.reads_just(".pool .issued", "1").await;
        browser.driver.close_window().await.unwrap();
        browser.driver.switch_to_window(first.clone()).await.unwrap();
    }

    browser.click("#forget").await;
    browser.reads("#observe .why", "To see what this server does, a token is needed.").await;
    assert_eq!(browser.run("return sessionStorage.length").await, json!(0));
    // A token with the scope `draw` alone is enough to draw.
    browser.click("#draw-one").await;
    browser.enter("#draw-token", &draw.text).await;
    drawn(&browser).await;
    assert_eq!(browser.text("#now").await, "");
    browser.finish(&["401", "403"]).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_only_the_pools_of_its_token() {
    let Some(browser) = Browser::start().await else { return };
    let observe = Token::with("monitor", "observe", &["--pool", "ticket"]).await;
    let site = Site::new(&with_tokens(config().pool("ticket", 1, 1_000, 1, 100), &[&observe]));
    site.fill().await;
    let server = site.start().await;
    browser.open(server.address()).await;
    browser.enter("#observe-token", &observe.text).await;
    browser.reads_just(".pool .name", "ticket").await;
    browser.holds("document.querySelectorAll('.pool').length === 1").await;
    browser.holds("document.querySelector('#pool').innerText.trim() === 'ticket'").await;
    browser.holds("!document.body.innerText.includes('int_shard')").await;
    browser.finish(&["401"]).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_says_that_the_server_is_gone_and_recovers_by_itself() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let passage = Passage::open(&server).await;
    browser.open(&passage.address).await;
    browser.reads("#state", "all pools serve").await;
    browser.holds(&starts_are(&started_at(&server).await)).await;

    passage.server.send_replace(None);
    server.kill().await;
    browser.reads("#banner", "No response from the server since ").await;
    let banner = browser.text("#banner").await;
    let time = banner.strip_prefix("No response from the server since ").unwrap();
    let time = time.strip_suffix(". Trying again every second.").unwrap();
    assert!(time.len() == 8 && time.matches(':').count() == 2, "{banner}");
    browser.reads("#state", "no response").await;
    // In grey, red, green and blue are nearly equal.
    browser
        .holds(
            "(() => { const bar = document.querySelector('.level i'); \
               const [r, g, b] = getComputedStyle(bar).backgroundColor.match(/\\d+/g).map(Number); \
               return Math.max(r, g, b) - Math.min(r, g, b) < 12; })()",
        )
        .await;
    browser.click("#draw-one").await;
    browser.reads("#outcome", "No response from the server.").await;
    browser.picture("stale").await;

    let server = site.start().await;
    passage.server.send_replace(Some(server.address().to_owned()));
    browser.holds("document.querySelector('#banner').hidden").await;
    browser.reads("#state", "all pools serve").await;
    // The event ids of the new server begin at 1 again, and the page shows only its events.
    browser.holds(&starts_are(&started_at(&server).await)).await;
    browser.finish(&["net::ERR_"]).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_is_drawn_with_the_keyboard_alone() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config().pool("voucher", 1, 100_000, 2, 1_000));
    site.fill().await;
    let server = site.start().await;
    browser.open(server.address()).await;
    browser.reads("#state", "all pools serve").await;

    // Tab reaches these elements in this order, and each shows that it has the focus.
    for id in ["api", "pool", "draw-one", "copy"] {
        browser.press(Key::Tab).await;
        let focus = "const one = document.activeElement; const style = getComputedStyle(one); \
                     return [one.id, style.outlineStyle, parseFloat(style.outlineWidth) >= 2]";
        assert_eq!(browser.run(focus).await, json!([id, "solid", true]));
        match id {
            "api" => {}
            "pool" => browser.press(Key::Down).await,
            "draw-one" => {
                browser.press(Key::Enter).await;
                let answer = drawn(&browser).await;
                let one: One<'_> = serde_json::from_str(&answer).unwrap();
                assert!(one.shard.starts_with("voucher_shard_"), "{answer}");
                browser.reads("#outcome", "Drawn. Status 200").await;
                browser.reads_just(".pool:last-child .issued", "1").await;
            }
            _ => {
                browser.press(Key::Enter).await;
                browser.holds("document.querySelector('#copied').innerText !== ''").await;
                let line = browser.text("#curl").await;
                let url = format!("http://{}/random?type=voucher", server.address());
                assert_eq!(line, format!("curl '{url}'"));
            }
        }
    }
    browser.finish(&[]).await;
    server.stop().await;
}

/// Story: a page left open in a hundred tabs sent the server a hundred requests a second.
#[tokio::test(flavor = "multi_thread")]
async fn a_hidden_tab_sends_no_requests() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config());
    let server = site.start().await;
    let asked =
        "performance.getEntriesByType('resource').filter(one => one.name.endsWith('/status'))";
    browser.open(server.address()).await;
    browser.holds(&format!("{asked}.length > 1")).await;
    let first = browser.driver.window().await.unwrap();
    let second = browser.driver.new_tab().await.unwrap();
    browser.driver.switch_to_window(second).await.unwrap();
    browser.open(server.address()).await;
    // The second tab sends a request each second. In these five seconds, the first tab must send none.
    browser.holds(&format!("{asked}.length > 5")).await;
    browser.driver.close_window().await.unwrap();
    browser.driver.switch_to_window(first).await.unwrap();
    browser
        .holds(&format!(
            "{asked}.some((one, at, all) => at > 0 && one.startTime - all[at - 1].startTime > 4000)"
        ))
        .await;
    browser.finish(&[]).await;
    server.stop().await;
}

/// Story: the page was grey on grey when read from five metres, and wider than the screen of a phone.
#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_read_in_light_and_dark_and_on_a_phone() {
    let Some(browser) = Browser::start().await else { return };
    // The largest range and the longest name that are possible.
    let longest = "v".repeat(32);
    let pools = Config::new()
        .pool("int", 0, 9_007_199_254_740_991_i64, 2, 20_000)
        .pool(&longest, 1, 99_999.999, 3, 1_000)
        .set(&format!("pools.{longest}.decimals"), 3)
        .set("pools.ticket.pattern", "'No ####'");
    let site = Site::new(&pools);
    site.fill().await;
    let server = site.start().await;
    for _ in 0..30 {
        server.take("int", Some(1_000)).await;
        server.take(&longest, Some(50)).await;
    }
    browser.open(server.address()).await;
    browser.reads_just(".pool .issued", "30,000").await;
    browser.reads_just(".pool:last-child .range", "1.000 to 99,999.999").await;
    browser.reads_just(".pool:nth-child(2) .range", "No 0000 to No 9999").await;
    browser.holds("document.querySelectorAll('#rate-chart .line').length > 0").await;
    browser.click("#draw-one").await;
    drawn(&browser).await;

    // Computes the contrast of each visible text with its background (WCAG 2.2, 1.4.3).
    let pale = "const parts = (color) => color.match(/[\\d.]+/g).map(Number); \
        const light = ([r, g, b]) => [r, g, b].map(c => c / 255) \
          .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4) \
          .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0); \
        const behind = (node) => { const color = parts(getComputedStyle(node).backgroundColor); \
          return color[3] === 0 && node.parentElement ? behind(node.parentElement) : color; }; \
        return [...document.querySelectorAll('body *')].filter(node => node.checkVisibility() && \
            [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())) \
          .map(node => { const style = getComputedStyle(node); \
            const text = light(parts(node.namespaceURI.endsWith('svg') ? style.fill : style.color)); \
            const back = light(behind(node)); \
            return [node.textContent, \
              (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05)]; })";
    for scheme in ["light", "dark"] {
        browser.prefer("prefers-color-scheme", scheme).await;
        let dark = format!("matchMedia('(prefers-color-scheme: {scheme})').matches");
        browser.holds(&dark).await;
        let texts = browser.run(pale).await;
        let texts = texts.as_array().unwrap();
        assert!(texts.len() > 30, "{texts:?}");
        for text in texts {
            assert!(text[1].as_f64().unwrap() >= 4.5, "{scheme}: {text}");
        }
        browser.picture(scheme).await;
    }
    browser.prefer("prefers-color-scheme", "light").await;
    browser.resize(360).await;
    let wide = "return [...document.querySelectorAll('*')].filter(node => node.checkVisibility() && \
                node.getBoundingClientRect().right > 360.5).map(node => node.outerHTML.slice(0, 80))";
    assert_eq!(browser.run(wide).await, json!([]));
    let scroll = "return document.documentElement.scrollWidth";
    assert_eq!(browser.run(scroll).await, json!(360));
    browser.picture("narrow").await;

    browser.prefer("prefers-reduced-motion", "reduce").await;
    browser
        .holds("getComputedStyle(document.querySelector('.level i')).transitionDuration === '0s'")
        .await;
    browser.finish(&[]).await;
    server.stop().await;
}

/// Starts the web server of another site, with an empty page at each path, and returns its port.
async fn another_site() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut visitor, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = [0; 8_192];
                let _ = visitor.read(&mut request).await?;
                let page = "<!DOCTYPE html><title>another site</title>";
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n";
                let answer = format!("{head}content-length: {}\r\n\r\n{page}", page.len());
                visitor.write_all(answer.as_bytes()).await
            });
        }
    });
    port
}

/// Returns how many numbers all pools together have issued.
async fn issued(server: &Server) -> u64 {
    let status: Value = server.get("/status").await.parse();
    status["pools"]["int"]["issued"].as_u64().unwrap()
}

/// Returns the requests for numbers so far, by status.
async fn requests(server: &Server) -> Value {
    let status: Value = server.get("/status").await.parse();
    status["requests"]["by_status"].clone()
}

/// Story: a visit to a page that contained an image with this server's address emptied the pool. Another
/// page, under a name that resolved to 127.0.0.1, could read the numbers.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_sites_take_no_numbers() {
    let Some(browser) = Browser::start().await else { return };
    let site = Site::new(&config());
    site.fill().await;
    let server = site.start().await;
    let own = server.address().to_owned();
    let port = own.rsplit_once(':').unwrap().1;
    let other = another_site().await;
    // An image, four kinds of fetch, and a frame. `window.done` counts those that have ended.
    let attack = |target: &str| {
        format!(
            "window.done = 0; const url = '{target}'; const end = () => window.done += 1; \
             const image = new Image(); image.onload = image.onerror = end; image.src = url; \
             for (const [method, mode] of \
                  [['GET', 'cors'], ['GET', 'no-cors'], ['POST', 'no-cors'], ['HEAD', 'no-cors']]) \
               fetch(url, {{ method, mode }}).then(end, end); \
             const frame = document.createElement('iframe'); frame.onload = end; frame.src = url; \
             document.body.append(frame); return true"
        )
    };
    let mut refused = 0;
    for (page, target) in [
        // Another site.
        (format!("http://evil.test:{other}/"), format!("http://{own}/random?count=7")),
        // Another port of this machine.
        (format!("http://127.0.0.1:{other}/"), format!("http://{own}/random?count=7")),
        (format!("http://localhost:{other}/"), format!("http://localhost:{port}/random?count=7")),
        (format!("http://127.0.0.1:{other}/"), format!("http://localhost:{port}/random?count=7")),
        // A name that resolves to this machine.
        (format!("http://evil.test:{other}/"), format!("http://evil.test:{port}/random?count=7")),
        (format!("http://evil.test:{port}/"), "/random?count=7".to_owned()),
    ] {
        browser.driver.goto(&page).await.unwrap();
        browser.run(&attack(&target)).await;
        browser.holds("window.done === 6").await;
        let seen = requests(&server).await["403"].as_u64().unwrap_or(0);
        assert!(seen >= refused + 4, "{page} {target}: {seen} refused, {refused} before");
        refused = seen;
        assert_eq!(issued(&server).await, 0, "{page} {target}");
    }
    // The page itself may be shown under that name, but its requests are refused.
    for path in ["/random", "/status", "/metrics"] {
        let status =
            browser.run(&format!("return fetch('{path}').then(answer => answer.status)")).await;
        assert_eq!(status, json!(403), "{path}");
    }
    // A link from another site takes no number either.
    browser.driver.goto(format!("http://evil.test:{other}/")).await.unwrap();
    browser.run(&format!("location.href = 'http://{own}/random?count=7'; return true")).await;
    browser.holds("document.body.innerText.includes('cross_site')").await;
    assert_eq!(issued(&server).await, 0);

    // The page and the description work under each address of this machine.
    let mut taken = 0;
    for address in [own.clone(), format!("localhost:{port}")] {
        browser.open(&address).await;
        browser.reads("#state", "all pools serve").await;
        browser.click("#draw-one").await;
        assert!(drawn(&browser).await.contains("number"));
        browser.driver.goto(format!("http://{address}/docs")).await.unwrap();
        let random = "#operations-numbers-get_random";
        browser.click(&format!("{random} .opblock-summary-control")).await;
        browser.click(&format!("{random} .try-out__btn")).await;
        browser.click(&format!("{random} .execute")).await;
        browser
            .reads(&format!("{random} .live-responses-table tbody .response-col_status"), "200")
            .await;
        taken += 2;
        assert_eq!(issued(&server).await, taken);
    }
    browser.driver.quit().await.unwrap();
    server.stop().await;
}
