//! The server against what the Kubernetes API conventions and its documentation say, through a client of its own.

mod access;
mod client;
mod reading;
mod watching;
mod writing;

use super::{ApiServer, Kind, Rule, User};
use client::{Client, JSON, MERGE, STRATEGIC};
use serde_json::{Value, json};
use std::net::Ipv4Addr;

fn server() -> ApiServer {
    ApiServer::start(None, Ipv4Addr::LOCALHOST).unwrap()
}

#[track_caller]
fn message(answer: &(u16, Value)) -> (u16, &str, &str) {
    let (code, status) = answer;
    assert_eq!(status["kind"], "Status", "{status}");
    assert_eq!(status["status"], "Failure");
    assert_eq!(status["code"], *code);
    (
        *code,
        status["reason"].as_str().unwrap(),
        status["message"].as_str().unwrap(),
    )
}
