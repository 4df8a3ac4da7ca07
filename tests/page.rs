//! The page at `/`, in Chromium: what its visitors see and do. Where Chromium or its driver is missing
//! (Debian packages chromium and chromium-driver), these tests say so and pass (not in `.ci/run`);
//! the first needs neither.
//!
//! How the page looks is kept as pictures in `target/tmp/page/`: light, dark, narrow, stale, locked.

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
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const PARTS: [(&str, &str); 4] = [
    ("/", "text/html; charset=utf-8"),
    ("/page.css", "text/css; charset=utf-8"),
    ("/page.js", "text/javascript; charset=utf-8"),
    ("/page.svg", "image/svg+xml"),
];

/// Two shards that one can watch getting empty.
fn config() -> Config {
    Config::new().pool("int", 1, 100_000, 2, 1_000)
}

/// A browser of this test alone, and its driver.
struct Browser {
    driver: WebDriver,
    // Behind the session, which has to end first.
    _process: Process,
}

impl Browser {
    /// Nothing where there is none.
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
        // A container has no sandbox for root, and a small /dev/shm.
        for flag in ["--no-sandbox", "--disable-dev-shm-usage"] {
            wishes.add_arg(flag).unwrap();
        }
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

    /// What a function body in JavaScript returns.
    async fn run(&self, script: &str) -> Value {
        self.driver.execute(script, []).await.unwrap().json().clone()
    }

    /// What is to be read where this selector points first; empty where nothing is.
    async fn text(&self, selector: &str) -> String {
        let script = format!(
            "const node = document.querySelector({selector:?}); \
             return node?.checkVisibility() ? node.innerText : ''"
        );
        self.run(&script).await.as_str().unwrap().to_owned()
    }

    /// Waits until this is to be read there.
    async fn reads(&self, selector: &str, words: &str) {
        let what = format!("{words:?} at {selector}");
        eventually(&what, async || self.text(selector).await.contains(words).then_some(())).await;
    }

    /// Waits until this, and no more, is to be read there: for figures, of which 0 is in 10 as well.
    async fn reads_just(&self, selector: &str, words: &str) {
        let what = format!("just {words:?} at {selector}");
        eventually(&what, async || (self.text(selector).await.trim() == words).then_some(())).await;
    }

    /// Waits until this expression in JavaScript holds.
    async fn holds(&self, expression: &str) {
        let script = format!("return Boolean({expression})");
        eventually(expression, async || self.run(&script).await.as_bool().unwrap().then_some(()))
            .await;
    }

    /// What can be seen and pressed there, as soon as it can.
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

    /// Presses a key wherever the focus is.
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

    /// As a visitor who prefers this has it.
    async fn prefer(&self, feature: &str, value: &str) {
        let features = json!({"features": [{"name": feature, "value": value}]});
        self.devtools("Emulation.setEmulatedMedia", features).await;
    }

    /// Keeps a picture of the whole page.
    async fn picture(&self, name: &str) {
        let wishes = json!({"format": "png", "captureBeyondViewport": true});
        let answer = self.devtools("Page.captureScreenshot", wishes).await;
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
        fs::create_dir_all(&folder).unwrap();
        let bytes = thirtyfour::support::base64_decode(answer["data"].as_str().unwrap()).unwrap();
        fs::write(folder.join(name).with_extension("png"), bytes).unwrap();
    }

    /// Ends the session. Nothing may have come from elsewhere, and the console has to be empty but for
    /// requests that failed with one of these words.
    async fn finish(self, failures: &[&str]) {
        let elsewhere = "return performance.getEntriesByType('resource').map(entry => entry.name) \
                         .filter(name => new URL(name).origin !== location.origin)";
        assert_eq!(self.run(elsewhere).await, json!([]));
        let loaded = "return performance.getEntriesByType('resource').length";
        assert!(self.run(loaded).await.as_u64().unwrap() >= 3, "the page loads its parts");
        for entry in self.driver.browser_log().await.unwrap() {
            let known = failures.iter().any(|words| entry.message.contains(words));
            let failed = entry.source.as_deref() == Some("network") && known;
            assert!(failed, "in the console: {entry:?}");
        }
        self.driver.quit().await.unwrap();
    }
}

/// Passes connections on to a server, as long as there is one.
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

/// When a server began to serve, as its events have it.
async fn started_at(server: &Server) -> String {
    let status: Value = server.get("/status").await.parse();
    let events = status["events"].as_array().unwrap();
    let started = events.iter().find(|event| event["kind"] == "started").unwrap();
    started["at"].as_str().unwrap().to_owned()
}

/// That of the rows of events exactly one tells of a start, at this time, and none is older.
fn starts_are(at: &str) -> String {
    format!(
        "(() => {{ const rows = [...document.querySelectorAll('#events li')]; \
           const starts = rows.filter(row => row.querySelector('[data-is=started]')); \
           return starts.length === 1 && starts[0].querySelector('time').dateTime === '{at}' \
             && rows.every(row => row.querySelector('time').dateTime >= '{at}'); }})()"
    )
}

/// What drawing shows, as it came.
async fn drawn(browser: &Browser) -> String {
    browser.holds("!document.querySelector('#answer').hidden").await;
    browser.text("#answer").await
}

/// Story: the page came with an answer's loose headers, and another site framed it and clicked; or one
/// of its parts was closed to those without a token, and the page stayed empty.
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
        }
        let answer = server.send(Method::POST, path).await;
        answer.assert_status(405);
        assert_eq!(answer.header("allow"), Some("GET, HEAD"), "{path}");
    }
    for path in ["/status", "/page", "/page.html", "//", "/page.js/"] {
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
    // As far as the bars go, so far the text, the meter and the picture agree.
    browser
        .holds(
            "[...document.querySelectorAll('.level')].every(bar => { \
               const left = Number(bar.ariaValueNow), size = Number(bar.ariaValueMax); \
               const scale = new DOMMatrix(getComputedStyle(bar.firstElementChild).transform).a; \
               return left < size && Math.abs(scale - left / size) < 0.001; })",
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

/// Story: a server of this kind shipped a page that broke as soon as a key was set.
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
        assert_eq!(browser.text("#now").await, "", "shown without a token");
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

    // The secrets are nowhere to be seen, and in no address.
    let seen = "return document.documentElement.outerHTML + location.href + JSON.stringify( \
                performance.getEntriesByType('resource')) + document.cookie + \
                JSON.stringify(localStorage) + \
                [...document.querySelectorAll('input')].map(input => input.value)";
    let seen = browser.run(seen).await;
    for token in [&observe, &draw] {
        assert!(!seen.as_str().unwrap().contains(&token.text), "{seen}");
    }

    // It is kept when the page is loaded anew, and for this tab alone.
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
    // Who has a token for drawing alone can draw.
    browser.click("#draw-one").await;
    browser.enter("#draw-token", &draw.text).await;
    drawn(&browser).await;
    assert_eq!(browser.text("#now").await, "");
    browser.finish(&["401", "403"]).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_gone_is_said_to_be_and_comes_back_by_itself() {
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
    browser.reads("#banner", "No answer from the server since ").await;
    let banner = browser.text("#banner").await;
    let time = banner.strip_prefix("No answer from the server since ").unwrap();
    let time = time.strip_suffix(". Trying again every second.").unwrap();
    assert!(time.len() == 8 && time.matches(':').count() == 2, "{banner}");
    browser.reads("#state", "no answer").await;
    // Grey: as much of red as of green and blue.
    browser
        .holds(
            "(() => { const bar = document.querySelector('.level i'); \
               const [r, g, b] = getComputedStyle(bar).backgroundColor.match(/\\d+/g).map(Number); \
               return Math.max(r, g, b) - Math.min(r, g, b) < 12; })()",
        )
        .await;
    browser.click("#draw-one").await;
    browser.reads("#outcome", "No answer from the server.").await;
    browser.picture("stale").await;

    let server = site.start().await;
    passage.server.send_replace(Some(server.address().to_owned()));
    browser.holds("document.querySelector('#banner').hidden").await;
    browser.reads("#state", "all pools serve").await;
    // Its ids begin at 1 again, and its events are its own.
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

    // In this order, and each can be seen to have the focus.
    for id in ["pool", "draw-one", "copy"] {
        browser.press(Key::Tab).await;
        let focus = "const one = document.activeElement; const style = getComputedStyle(one); \
                     return [one.id, style.outlineStyle, parseFloat(style.outlineWidth) >= 2]";
        assert_eq!(browser.run(focus).await, json!([id, "solid", true]));
        match id {
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

/// Story: a page forgotten in a hundred tabs asked the server a hundred times a second.
#[tokio::test(flavor = "multi_thread")]
async fn a_tab_that_nobody_sees_asks_for_nothing() {
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
    // Once a second: five seconds, which the clock of the first tab has to have seen pass in silence.
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

/// Story: grey on grey, read on a wall from five metres; and a page wider than the phone.
#[tokio::test(flavor = "multi_thread")]
async fn it_can_be_read_in_light_and_dark_and_on_a_phone() {
    let Some(browser) = Browser::start().await else { return };
    // The largest range and the longest name that there are.
    let longest = "v".repeat(32);
    let pools = Config::new()
        .pool("int", 0, 9_007_199_254_740_991_i64, 2, 20_000)
        .pool(&longest, 1, 99_999.999, 3, 1_000)
        .set(&format!("pools.{longest}.decimals"), 3);
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
    browser.holds("document.querySelectorAll('#rate-chart .line').length > 0").await;
    browser.click("#draw-one").await;
    drawn(&browser).await;

    // Of each text that can be seen, against what is behind it (WCAG 2.2, 1.4.3).
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
