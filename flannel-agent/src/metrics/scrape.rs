//! The endpoint.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse as _, Response},
    routing::get,
};
use prometheus_client::{encoding::text, registry::Registry};
use tokio_util::sync::CancellationToken;

use super::{Metrics, PREFIX, node::Node, process::Process};
use crate::{
    health::Board,
    http::{self, Service},
};

const SERVICE: Service = Service {
    paths: "/metrics",
    failure: "serve metrics",
    flags: "--metrics-addr",
};
/// The content type of OpenMetrics 1.0 text.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves `/metrics` in the background until cancelled.
pub(crate) fn serve(
    address: SocketAddr,
    metrics: Metrics,
    board: Board,
    cancel: CancellationToken,
) {
    let registry = Arc::new(registry(metrics, board));
    http::serve(SERVICE, address, router(registry), cancel);
}

fn registry(metrics: Metrics, board: Board) -> Registry {
    let mut registry = Registry::default();
    metrics.register(registry.sub_registry_with_prefix(PREFIX));
    registry.register_collector(Box::new(Node { metrics, board }));
    registry.register_collector(Box::new(Process));
    registry
}

fn router(registry: Arc<Registry>) -> Router {
    let metrics = move || async move { answer(&registry) };
    Router::new().route("/metrics", get(metrics)).fallback((
        StatusCode::NOT_FOUND,
        "404 page not found: metrics are at /metrics\n",
    ))
}

fn answer(registry: &Registry) -> Response {
    let mut body = String::new();
    match text::encode(&mut body, registry) {
        Ok(()) => ([(CONTENT_TYPE, OPEN_METRICS)], body).into_response(),
        Err(error) => {
            tracing::error!(%error, "write the metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
