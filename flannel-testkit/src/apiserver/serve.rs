//! Connections and requests.

use super::auth::{User, Users, authorize};
use super::discovery;
use super::fault::Faults;
use super::read;
use super::refusal::Refusal;
use super::request::{self, Attributes, Query, Target, Verb};
use super::store::{Kind, Store};
use super::watch::Watch;
use super::write::{self, PatchKind};
use axum::body::{Body, to_bytes};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{Shutdown, shutdown};
use rustls::ServerConfig;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;

/// Bytes that a request may have.
const LARGEST: usize = 3 << 20;
/// Lines of a watch that may wait for a slow client.
const BACKLOG: usize = 100;

/// A request that was answered, for tests that count or look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub user: String,
    /// `None` for what is no resource.
    pub verb: Option<Verb>,
    pub method: String,
    pub path: String,
    pub query: String,
    pub user_agent: String,
    pub content_type: String,
    pub body: String,
    pub status: u16,
}

/// All that the server knows.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) users: Users,
    pub(crate) faults: Faults,
    pub(crate) namespaces: Vec<String>,
    pub(crate) tls: Arc<ServerConfig>,
    pub(crate) asked: Vec<Asked>,
    /// Whether the socket is open at this moment.
    pub(crate) bound: bool,
    /// How many connections are open, by the epoch in which they were accepted.
    pub(crate) connections: BTreeMap<u64, usize>,
    /// Why it could not be opened.
    pub(crate) bind_error: Option<String>,
    pub(crate) stopping: bool,
}

/// The state, and how to learn that it has changed.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Bound or not, or which connections are open, has changed.
    pub(crate) socket: Condvar,
    signal: watch::Sender<()>,
}

impl Shared {
    pub(crate) fn new(state: State) -> Shared {
        Shared {
            state: Mutex::new(state),
            socket: Condvar::new(),
            signal: watch::Sender::new(()),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and tells all who wait.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let value = change(&mut self.lock());
        self.signal.send_replace(());
        value
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.signal.subscribe()
    }

    /// Waits until the state is as wanted.
    async fn wait_until(&self, wanted: impl Fn(&State) -> bool) {
        let mut signal = self.subscribe();
        loop {
            signal.mark_unchanged();
            if wanted(&self.lock()) {
                return;
            }
            if signal.changed().await.is_err() {
                return;
            }
        }
    }
}

/// Accepts connections until the server is to stop.
pub(crate) async fn run(shared: Arc<Shared>, address: SocketAddr) {
    loop {
        shared
            .wait_until(|state| state.faults.listening || state.stopping)
            .await;
        if shared.lock().stopping {
            return;
        }
        let listener = TcpListener::bind(address).await;
        let listener = shared.change(|state| match listener {
            Ok(listener) => {
                state.bound = true;
                state.bind_error = None;
                Some(listener)
            }
            Err(error) => {
                state.bind_error = Some(format!("listen on {address}: {error}"));
                state.faults.listening = false;
                None
            }
        });
        shared.socket.notify_all();
        let Some(listener) = listener else {
            continue;
        };
        let closing = shared.wait_until(|state| !state.faults.listening || state.stopping);
        tokio::select! {
            () = closing => {}
            () = accept(&shared, &listener) => {}
        }
        // A program that another thread is just starting has a copy of the socket, which closing ours leaves open.
        let _closed = shutdown(listener.as_raw_fd(), Shutdown::Both);
        drop(listener);
        shared.change(|state| state.bound = false);
        shared.socket.notify_all();
    }
}

async fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    loop {
        // A connection that broke while it waited is no reason to stop.
        if let Ok((stream, _)) = listener.accept().await
            && let Some(open) = Open::enter(shared)
        {
            tokio::spawn(connection(open, stream));
        }
    }
}

/// A connection that is counted.
struct Open {
    shared: Arc<Shared>,
    epoch: u64,
}

impl Open {
    /// `None` if nobody listens any more: the connection came at the same moment.
    fn enter(shared: &Arc<Shared>) -> Option<Open> {
        let mut state = shared.lock();
        if !state.faults.listening {
            return None;
        }
        let epoch = state.faults.connection_epoch;
        *state.connections.entry(epoch).or_default() += 1;
        let shared = Arc::clone(shared);
        Some(Open { shared, epoch })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if let Some(count) = state.connections.get_mut(&self.epoch) {
            *count -= 1;
            if *count == 0 {
                state.connections.remove(&self.epoch);
            }
        }
        self.shared.socket.notify_all();
    }
}

async fn connection(open: Open, stream: TcpStream) {
    let shared = &open.shared;
    let cut = shared.wait_until(|state| state.faults.connection_epoch != open.epoch);
    tokio::select! {
        () = cut => {}
        () = serve(shared, stream) => {}
    }
}

async fn serve(shared: &Arc<Shared>, stream: TcpStream) {
    shared.wait_until(|state| !state.faults.hanging).await;
    // Watches send small lines; without a delay they arrive when they are sent.
    let _without = stream.set_nodelay(true);
    let acceptor = TlsAcceptor::from(Arc::clone(&shared.lock().tls));
    let Ok(stream) = acceptor.accept(stream).await else {
        return;
    };
    let certificates = stream.get_ref().1.peer_certificates();
    let certificate = certificates
        .and_then(|chain| chain.first())
        .map(|der| der.to_vec());
    let service = service_fn(|request| {
        let shared = Arc::clone(shared);
        let certificate = certificate.clone();
        async move { Ok::<_, Infallible>(answer(shared, certificate.as_deref(), request).await) }
    });
    let serving =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // A client that leaves early is no concern of the server's.
    drop(serving.await);
}

/// What comes back.
enum Reply {
    Object(u16, Vec<u8>),
    Pieces(VecDeque<Bytes>),
    Watch(Box<Watch>),
    Text(&'static str),
}

async fn answer(
    shared: Arc<Shared>,
    certificate: Option<&[u8]>,
    request: Request<Incoming>,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let body = to_bytes(Body::new(body), LARGEST).await.unwrap_or_default();
    shared.wait_until(|state| !state.faults.hanging).await;
    let delay = shared.lock().faults.delay;
    tokio::time::sleep(delay).await;

    let text = |name: header::HeaderName| header_text(&head.headers, &name);
    let query_text = head.uri.query().unwrap_or_default();
    let query = request::query(query_text);
    let mut asked = Asked {
        user: String::new(),
        verb: None,
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        query: query_text.to_owned(),
        user_agent: text(header::USER_AGENT),
        content_type: text(header::CONTENT_TYPE),
        body: String::from_utf8_lossy(&body).into_owned(),
        status: 200,
    };
    let bearer = text(header::AUTHORIZATION);
    let bearer = bearer
        .strip_prefix("Bearer ")
        .filter(|token| !token.is_empty());
    let accept = text(header::ACCEPT);
    let reply = shared.change(|state| {
        let reply = decide(state, certificate, bearer, &accept, &mut asked, &query);
        asked.status = match &reply {
            Ok(Reply::Object(code, _)) => *code,
            Ok(_) => 200,
            Err(refusal) => refusal.code,
        };
        state.asked.push(asked);
        reply
    });
    let mut response = match reply {
        Ok(Reply::Object(code, text)) => respond(code, Body::from(text)),
        Ok(Reply::Text(text)) => {
            let mut response = respond(200, Body::from(text));
            let plain = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, plain);
            response
        }
        Ok(Reply::Pieces(pieces)) => respond(200, Body::new(Pieces(pieces))),
        Ok(Reply::Watch(watch)) => {
            let (out, lines) = mpsc::channel(BACKLOG);
            tokio::spawn(watch.run(Arc::clone(&shared), out));
            respond(200, Body::new(Lines(lines)))
        }
        Err(refusal) => refuse(refusal),
    };
    let uid = HeaderValue::try_from(write::uid());
    if let Ok(uid) = uid {
        response.headers_mut().insert("audit-id", uid);
    }
    response
}

fn header_text(headers: &HeaderMap, name: &header::HeaderName) -> String {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

fn respond(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::OK);
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn refuse(refusal: Refusal) -> Response<Body> {
    let mut response = respond(refusal.code, Body::from(refusal.body));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static(refusal.content_type),
    );
    if let Some(seconds) = refusal.retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// Authenticates, authorizes and does what was asked, as one step.
fn decide(
    state: &mut State,
    certificate: Option<&[u8]>,
    bearer: Option<&str>,
    accept: &str,
    asked: &mut Asked,
    query: &Query,
) -> Result<Reply, Refusal> {
    let target = request::target(&asked.method, &asked.path, query);
    if let Ok(Target::Resource(attributes)) = &target {
        asked.verb = Some(attributes.verb);
    }
    // Overload is noticed before anything is looked at.
    if let Some(failure) = state.faults.take(asked.verb) {
        return Err(match failure.code {
            429 => Refusal::too_many_requests(failure.retry_after.unwrap_or(1)),
            code => Refusal::internal(code, failure.retry_after),
        });
    }
    let user = state.users.identify(certificate, bearer)?;
    asked.user.clone_from(&user.name);
    let target = target?;
    authorize(&user, &target)?;
    match target {
        Target::Path { path, .. } => match path.as_str() {
            "/healthz" | "/livez" | "/readyz" => Ok(Reply::Text("ok")),
            path => {
                let document = discovery::document(path).ok_or_else(Refusal::no_such_path)?;
                Ok(Reply::Object(200, document.to_string().into_bytes()))
            }
        },
        Target::Resource(attributes) => {
            if !accepts_json(accept) {
                return Err(Refusal::not_acceptable());
            }
            resource(state, &user, &attributes, asked, query)
        }
    }
}

/// Whether the client takes plain JSON; tables, metadata alone and protobuf are not to be had.
fn accepts_json(accept: &str) -> bool {
    accept.is_empty()
        || accept.split(',').any(|one| {
            let one = one.trim();
            one.starts_with("application/json") && !one.contains("as=") || one.starts_with("*/*")
        })
}

fn resource(
    state: &mut State,
    _user: &User,
    attributes: &Attributes,
    asked: &Asked,
    query: &Query,
) -> Result<Reply, Refusal> {
    let manager = query.get("fieldManager").map_or_else(
        || asked.user_agent.split('/').next().unwrap_or_default(),
        String::as_str,
    );
    let kind = attributes.kind;
    let store = &mut state.store;
    let object = |code, text: Vec<u8>| Ok(Reply::Object(code, text));
    match attributes.verb {
        Verb::Get => object(200, write::find(store, attributes)?.text(kind)),
        Verb::List => Ok(Reply::Pieces(read::list(store, attributes, query)?)),
        Verb::Watch => {
            let watch = Watch::open(store, &state.faults, attributes, query)?;
            Ok(Reply::Watch(Box::new(watch)))
        }
        Verb::Create => {
            let namespace = &attributes.namespace;
            if kind.namespaced() && !state.namespaces.contains(namespace) {
                return Err(Refusal::no_namespace(namespace));
            }
            let value = typed(&asked.body, kind)?;
            let made = write::create(store, kind, namespace, manager, value)?;
            object(201, made.text(kind))
        }
        Verb::Update => {
            let value = typed(&asked.body, kind)?;
            object(
                200,
                write::replace(store, attributes, manager, value)?.text(kind),
            )
        }
        Verb::Patch => {
            let how = PatchKind::of(&asked.content_type)?;
            let patch = parse(&asked.body)?;
            object(
                200,
                write::patch(store, attributes, manager, how, patch)?.text(kind),
            )
        }
        Verb::Delete => {
            let options = if asked.body.trim().is_empty() {
                Value::Null
            } else {
                parse(&asked.body)?
            };
            let gone = write::delete(store, attributes, &options)?.value();
            let details = json!({
                "name": attributes.name, "kind": kind.plural(), "uid": gone["metadata"]["uid"],
            });
            let status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
            });
            object(200, status.to_string().into_bytes())
        }
        Verb::DeleteCollection => Err(Refusal::method_not_allowed()),
    }
}

fn parse(body: &str) -> Result<Value, Refusal> {
    serde_json::from_str(body)
        .map_err(|error| Refusal::bad_request(&format!("error decoding the body: {error}")))
}

/// An object of the kind that the path says.
fn typed(body: &str, kind: Kind) -> Result<Value, Refusal> {
    let mut value = parse(body)?;
    let object = value
        .as_object_mut()
        .ok_or_else(|| Refusal::bad_request("the body is not an object"))?;
    let said = |name: &str, wanted: &str, have: Option<Value>| match have {
        Some(have) if have != wanted => Err(Refusal::bad_request(&format!(
            "the {name} of the object ({have}) does not match {wanted}"
        ))),
        _ => Ok(()),
    };
    said("kind", kind.name(), object.remove("kind"))?;
    said(
        "apiVersion",
        kind.api_version(),
        object.remove("apiVersion"),
    )?;
    Ok(value)
}

/// A list, sent without a copy of the whole.
struct Pieces(VecDeque<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}

/// The lines of a watch.
struct Lines(mpsc::Receiver<io::Result<Bytes>>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let line = std::task::ready!(self.0.poll_recv(context));
        Poll::Ready(line.map(|line| line.map(Frame::data)))
    }
}
