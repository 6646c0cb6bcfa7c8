//! A server that is asked to delete, and answers as some S3-compatible stores do. It keeps nothing.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// What it says to a request for the deletion of many: status and body.
pub(crate) type ToMany = (u16, &'static str);

/// What it was asked: the method, and of a deletion of one the path.
pub(crate) type Asked = Arc<Mutex<Vec<String>>>;

/// Starts it and returns its port. `denied` is the path that it does not delete. It ends with the runtime.
pub(crate) async fn start(to_many: ToMany, denied: &'static str) -> (u16, Asked) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = Asked::default();
    let told = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let asked = Arc::clone(&told);
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let asked = Arc::clone(&asked);
                    async move { Ok::<_, Infallible>(answer(&asked, to_many, denied, request).await) }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                let _ = connection.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    (port, asked)
}

async fn answer(
    asked: &Asked,
    (status, body): ToMany,
    denied: &str,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (parts, received) = request.into_parts();
    received.collect().await.unwrap();
    let (status, body) = match parts.method {
        Method::POST => {
            asked.lock().unwrap().push("POST".to_owned());
            (status, body)
        }
        Method::DELETE => {
            let path = parts.uri.path();
            asked.lock().unwrap().push(format!("DELETE {path}"));
            if path == denied {
                (403, "<Error><Code>AccessDenied</Code></Error>")
            } else {
                (204, "")
            }
        }
        _ => (400, "<Error><Code>InvalidRequest</Code></Error>"),
    };
    Response::builder().status(status).body(Full::new(Bytes::from_static(body.as_bytes()))).unwrap()
}
