//! The HTTP server for probes.

use std::net::SocketAddr;

use axum::{Router, extract::RawQuery, http::StatusCode, response::IntoResponse, routing::any};
use tokio_util::sync::CancellationToken;

use super::{
    Board,
    answer::{self, Answer},
};
use crate::http::{self, Service};

const SERVICE: Service = Service {
    paths: "/healthz, /livez and /readyz",
    failure: "Start healthz server error",
    flags: "--healthz-port, --healthz-ip",
};

/// Serves `/healthz`, `/livez` and `/readyz` in the background until cancelled.
pub(crate) fn serve(address: SocketAddr, board: Board, cancel: CancellationToken) {
    http::serve(SERVICE, address, router(board), cancel);
}

fn router(board: Board) -> Router {
    let healthz = |RawQuery(query): RawQuery| async move {
        respond(answer::alive(
            "healthz",
            answer::is_verbose(query.as_deref()),
        ))
    };
    let livez = |RawQuery(query): RawQuery| async move {
        respond(answer::alive("livez", answer::is_verbose(query.as_deref())))
    };
    let readyz = move |RawQuery(query): RawQuery| async move {
        let lacking = board.watch();
        let lacking = lacking.borrow();
        respond(answer::ready(
            &lacking,
            &board.notes(),
            answer::is_verbose(query.as_deref()),
        ))
    };
    Router::new()
        .route("/healthz", any(healthz))
        .route("/livez", any(livez))
        .route("/readyz", any(readyz))
        .fallback((StatusCode::NOT_FOUND, "404 page not found\n"))
}

fn respond((status, text): Answer) -> impl IntoResponse {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, text)
}
