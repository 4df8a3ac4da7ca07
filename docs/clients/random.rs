//! Prints one number. Usage: `cargo run --example random -- [URL] [POOL]`. The token
//! comes from `TOMBOLA_TOKEN`.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, bail};
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

const TRIES: u32 = 10;

#[derive(Deserialize)]
struct Body {
    /// The text that the server sent: 5.100000, not 5.1.
    number: Option<Box<RawValue>>,
    /// In a pool of codes, in place of a number.
    code: Option<String>,
}

async fn draw(
    client: &Client,
    url: &str,
    pool: &str,
    token: Option<&str>,
) -> anyhow::Result<String> {
    // All attempts have the same key, so the server takes only one number.
    let key = Uuid::new_v4().to_string();
    for left in (0..TRIES).rev() {
        let mut request = client.post(format!("{url}/random")).query(&[("type", pool)]);
        request = request.header("Idempotency-Key", &key);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let (status, headers, text) = match send(request).await {
            Ok(response) => response,
            // No response arrived, or only a part of it. If a number was taken for it, the next attempt
            // gets it.
            Err(_) if left > 0 => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
            Err(error) => return Err(error).context(format!("no response from {url}")),
        };
        match status {
            StatusCode::OK => {
                return Ok(match serde_json::from_str(&text)? {
                    Body { code: Some(code), .. } => code,
                    Body { number: Some(number), .. } => number.get().to_owned(),
                    Body { .. } => bail!("neither a number nor a code: {text}"),
                });
            }
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS if left > 0 => {
                let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
                let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(1);
                tokio::time::sleep(Duration::from_secs(seconds)).await;
            }
            _ => bail!("{status}: {text}"),
        }
    }
    unreachable!("the last try returns")
}

async fn send(request: RequestBuilder) -> reqwest::Result<(StatusCode, HeaderMap, String)> {
    let response = request.send().await?;
    let (status, headers) = (response.status(), response.headers().clone());
    Ok((status, headers, response.text().await?))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().unwrap_or_else(|| "http://127.0.0.1:8000".to_owned());
    let pool = arguments.next().unwrap_or_else(|| "int".to_owned());
    let token = std::env::var("TOMBOLA_TOKEN").ok();
    let client = Client::builder().timeout(Duration::from_secs(10)).build()?;
    println!("{}", draw(&client, &url, &pool, token.as_deref()).await?);
    Ok(())
}
