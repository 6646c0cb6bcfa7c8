//! A fake of Google Cloud Storage's XML interface, as far as the driver uses it.
//!
//! Written after the XML API's reference (put, get, delete an object, list
//! objects version 2) because no server that keeps `x-goog-if-generation-match`
//! is at hand. The real service was not exercised.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// Small, so that the battery turns pages.
const PAGE: usize = 300;

#[derive(Default)]
struct State {
    objects: BTreeMap<String, (Bytes, u64)>,
    generation: u64,
}

/// Starts the fake with one bucket and returns its port. It ends with the runtime.
pub(crate) async fn start(bucket: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let state = Arc::new(Mutex::new(State::default()));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let state = Arc::clone(&state);
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let state = Arc::clone(&state);
                    async move { Ok::<_, Infallible>(answer(bucket, &state, request).await) }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                let _ = connection.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    port
}

type Answer = Response<Full<Bytes>>;

async fn answer(bucket: &str, state: &Mutex<State>, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let path = decoded(parts.uri.path());
    let mut names = path.trim_start_matches('/').splitn(2, '/');
    if names.next() != Some(bucket) {
        return refusal(404, "NoSuchBucket");
    }
    let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let mut state = state.lock().unwrap();
    match (names.next(), parts.method) {
        (None | Some(""), Method::GET) => list(&state, parts.uri.query().unwrap_or_default()),
        (Some(name), Method::PUT) => {
            if header("x-goog-if-generation-match") == Some("0") && state.objects.contains_key(name)
            {
                return refusal(412, "PreconditionFailed");
            }
            state.generation += 1;
            let generation = state.generation;
            state.objects.insert(name.to_owned(), (body, generation));
            described(Response::builder(), generation).body(Full::default()).unwrap()
        }
        (Some(name), Method::GET) => match state.objects.get(name) {
            Some((bytes, generation)) => get(bytes, *generation, header("range")),
            None => refusal(404, "NoSuchKey"),
        },
        (Some(name), Method::DELETE) => match state.objects.remove(name) {
            Some(_) => Response::builder().status(204).body(Full::default()).unwrap(),
            None => refusal(404, "NoSuchKey"),
        },
        _ => refusal(405, "MethodNotAllowed"),
    }
}

fn described(
    builder: hyper::http::response::Builder,
    generation: u64,
) -> hyper::http::response::Builder {
    let now = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    builder
        .header("etag", format!("\"{generation}\""))
        .header("x-goog-generation", generation)
        .header("last-modified", now)
}

fn get(bytes: &Bytes, generation: u64, range: Option<&str>) -> Answer {
    let Some(range) = range else {
        return described(Response::builder(), generation).body(Full::new(bytes.clone())).unwrap();
    };
    let (start, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = last.parse::<usize>().unwrap().saturating_add(1).min(bytes.len());
    if start >= bytes.len() {
        return refusal(416, "InvalidRange");
    }
    described(Response::builder().status(206), generation)
        .header("content-range", format!("bytes {start}-{}/{}", end - 1, bytes.len()))
        .body(Full::new(bytes.slice(start..end)))
        .unwrap()
}

fn list(state: &State, query: &str) -> Answer {
    let query: BTreeMap<String, String> =
        url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    assert_eq!(query["list-type"], "2");
    let text = |name: &str| query.get(name).map_or("", String::as_str);
    let (prefix, delimiter, after) =
        (text("prefix"), text("delimiter"), text("continuation-token"));
    let (mut contents, mut prefixes, mut last) = (String::new(), BTreeSet::new(), String::new());
    let (mut count, mut is_truncated) = (0, false);
    for (name, (bytes, generation)) in &state.objects {
        let Some(rest) = name.strip_prefix(prefix).filter(|_| name.as_str() > after) else {
            continue;
        };
        let directory =
            rest.split_once('/').filter(|_| delimiter == "/").map(|(d, _)| format!("{prefix}{d}/"));
        if directory.as_ref().is_some_and(|d| prefixes.contains(d)) {
            last.clone_from(name);
            continue;
        }
        if count == PAGE {
            is_truncated = true;
            break;
        }
        count += 1;
        last.clone_from(name);
        if let Some(directory) = directory {
            prefixes.insert(directory);
        } else {
            let now = jiff::Timestamp::now();
            contents.push_str(&format!(
                "<Contents><Key>{name}</Key><LastModified>{now}</LastModified><ETag>\"{generation}\"</ETag><Size>{}</Size></Contents>",
                bytes.len()
            ));
        }
    }
    for prefix in prefixes {
        contents.push_str("<CommonPrefixes><Prefix>");
        contents.push_str(&prefix);
        contents.push_str("</Prefix></CommonPrefixes>");
    }
    let token = if is_truncated {
        format!("<NextContinuationToken>{last}</NextContinuationToken>")
    } else {
        String::new()
    };
    let text =
        format!("<?xml version='1.0'?><ListBucketResult>{token}{contents}</ListBucketResult>");
    Response::new(Full::new(text.into()))
}

fn refusal(status: u16, code: &str) -> Answer {
    let text =
        format!("<?xml version='1.0'?><Error><Code>{code}</Code><Message>fake</Message></Error>");
    Response::builder().status(status).body(Full::new(text.into())).unwrap()
}

/// Undoes percent encoding; the keys of the battery are ASCII.
fn decoded(path: &str) -> String {
    let mut bytes = path.bytes();
    let mut text = String::new();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits = [bytes.next().unwrap(), bytes.next().unwrap()];
            let code = u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap();
            text.push(char::from(code));
        } else {
            text.push(char::from(byte));
        }
    }
    text
}
