//! The routes: who may ask what, and in which shape. What happens is decided elsewhere.

use std::ops::Range;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Query, State};
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use collective_api::{
    CloneRequest, Event, HostOrders, HostReport, HostView, InstancePatch, InstanceView, JoinAnswer, JoinRequest,
    LaunchRequest, MoveRequest, NewToken, OperationRequest, OperationView, PlaneStatus, PowerRequest, StayAnswer,
    StayRequest, StoreStatus, TUNNEL_PROTOCOL, TokenView, TunnelAnswer, TunnelTarget,
};
use collective_model::{InstanceId, Name, OperationId, Spec, TunnelId};
use collective_store::depot::DepotError;
use hyper::upgrade::OnUpgrade;
use serde::Deserialize;

use crate::Plane;
use crate::access::Caller;
use crate::problem::{Answer, Failure};
use crate::tunnel::splice;

/// JSON bodies are at most this long, in bytes.
const MAX_JSON: usize = 4 << 20;
/// The longest a reader waits for a change.
const MAX_WAIT: Duration = Duration::from_secs(20);

pub(crate) fn router(plane: Plane) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/tokens", post(create_token))
        .route("/v1/hosts", get(hosts))
        .route("/v1/hosts/join", post(join))
        .route("/v1/hosts/{name}", delete(remove_host))
        .route("/v1/hosts/self/report", post(report))
        .route("/v1/hosts/self/orders", get(orders))
        .route("/v1/hosts/self/tunnels/{id}", post(tunnel_answered))
        .route("/v1/hosts/self/operations/{id}/tunnel", post(tunnel_between))
        .route("/v1/hosts/self/operations/{id}/take", post(take))
        .route("/v1/hosts/self/operations/{id}/stay", post(stay))
        .route("/v1/instances", get(instances).post(launch))
        .route("/v1/instances/{name}", get(instance).patch(change))
        .route("/v1/instances/{name}/power", post(power))
        .route("/v1/instances/{name}/move", post(move_instance))
        .route("/v1/instances/{name}/clone", post(clone_instance))
        .route("/v1/instances/{name}/operations", post(operate))
        .route("/v1/instances/{name}/history", get(history))
        .route("/v1/instances/{name}/tunnel", post(open_tunnel))
        .route("/v1/operations/{id}", get(operation))
        .merge(crate::http_store::routes())
        .layer(DefaultBodyLimit::max(MAX_JSON))
        .merge(crate::http_store::pack_routes())
        .merge(crate::http_private::routes())
        .fallback(async || Failure::missing("there is no such path; are the versions of plane and client the same?"))
        .with_state(plane)
}

pub(crate) fn parse<T: std::str::FromStr>(text: &str) -> Answer<T>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error| Failure::invalid(format!("{error}")))
}

/// The bytes that `bytes=FIRST-LAST` means; at least one.
pub(crate) fn range_of(header: Option<&HeaderValue>) -> Answer<Range<u64>> {
    let range = header.and_then(|range| range.to_str().ok()).and_then(|text| text.strip_prefix("bytes="));
    let range = range.and_then(|text| text.split_once('-'));
    let range = range.and_then(|(first, last)| Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?)));
    let (first, last) = range.ok_or_else(|| Failure::invalid("the range must be bytes=FIRST-LAST"))?;
    let end = last.checked_add(1).ok_or_else(|| Failure::invalid("the range is too long"))?;
    if first >= end {
        return Err(DepotError::Range(first..end).into());
    }
    Ok(first..end)
}

/// `after` and `wait_ms`: answer when the plane's revision differs from `after`, or when time is over.
#[derive(Deserialize)]
struct Wait {
    #[serde(default)]
    after: Option<u64>,
    #[serde(default)]
    wait_ms: u64,
}

impl Wait {
    async fn for_change(&self, plane: &Plane) {
        if let Some(after) = self.after {
            let mut state = plane.inner.state.subscribe();
            let wait = Duration::from_millis(self.wait_ms).min(MAX_WAIT);
            let _ = tokio::time::timeout(wait, state.wait_for(|revision| *revision != after)).await;
        }
    }
}

async fn status(State(plane): State<Plane>, caller: Caller) -> Answer<Json<PlaneStatus>> {
    caller.reader()?;
    Ok(Json(PlaneStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        listen: plane.inner.public.as_ref().map(|(address, _)| address.clone()),
        hosts: plane.host_views().await?,
        instances: plane.database().instances().await?.len() as u64,
        store: StoreStatus {
            place: plane.depot().place().to_owned(),
            trouble: plane.depot().trouble().map(|trouble| trouble.to_string()),
        },
    }))
}

async fn create_token(
    State(plane): State<Plane>,
    caller: Caller,
    Json(request): Json<NewToken>,
) -> Answer<Json<TokenView>> {
    caller.user()?;
    Ok(Json(plane.create_token(&request.kind).await?))
}

async fn hosts(State(plane): State<Plane>, caller: Caller) -> Answer<Json<Vec<HostView>>> {
    caller.user()?;
    Ok(Json(plane.host_views().await?))
}

async fn join(
    State(plane): State<Plane>,
    caller: Caller,
    Json(request): Json<JoinRequest>,
) -> Answer<Json<JoinAnswer>> {
    let token = caller.joiner()?;
    Ok(Json(plane.join(&request.name, token.as_ref()).await?))
}

async fn remove_host(State(plane): State<Plane>, caller: Caller, Path(name): Path<String>) -> Answer<Json<()>> {
    caller.user()?;
    Ok(Json(plane.remove_host(&parse(&name)?).await?))
}

async fn report(State(plane): State<Plane>, caller: Caller, Json(report): Json<HostReport>) -> Answer<Json<()>> {
    Ok(Json(plane.report(caller.host()?, report).await?))
}

#[derive(Deserialize)]
struct Seen {
    seen: u64,
    wait_ms: u64,
    /// Instances, with commas between them.
    #[serde(default)]
    left: String,
}

async fn orders(State(plane): State<Plane>, caller: Caller, Query(query): Query<Seen>) -> Answer<Json<HostOrders>> {
    let left: Vec<InstanceId> = query.left.split(',').filter_map(|id| id.parse().ok()).collect();
    Ok(Json(plane.orders(caller.host()?, query.seen, Duration::from_millis(query.wait_ms), left).await?))
}

async fn instances(State(plane): State<Plane>, caller: Caller) -> Answer<Json<Vec<InstanceView>>> {
    caller.user()?;
    Ok(Json(plane.instance_views().await?))
}

async fn launch(
    State(plane): State<Plane>,
    caller: Caller,
    Json(request): Json<LaunchRequest>,
) -> Answer<Json<InstanceView>> {
    caller.user()?;
    Ok(Json(plane.launch(request).await?))
}

async fn instance(
    State(plane): State<Plane>,
    caller: Caller,
    Path(name): Path<String>,
    Query(wait): Query<Wait>,
) -> Answer<Json<InstanceView>> {
    caller.user()?;
    wait.for_change(&plane).await;
    Ok(Json(plane.instance_view(&parse::<Name>(&name)?).await?))
}

async fn change(
    State(plane): State<Plane>,
    caller: Caller,
    Path(name): Path<String>,
    Json(patch): Json<InstancePatch>,
) -> Answer<Json<InstanceView>> {
    caller.user()?;
    Ok(Json(plane.change(&parse(&name)?, patch).await?))
}

async fn power(
    State(plane): State<Plane>,
    caller: Caller,
    Path(name): Path<String>,
    Json(request): Json<PowerRequest>,
) -> Answer<Json<InstanceView>> {
    caller.user()?;
    Ok(Json(plane.power(&parse(&name)?, request.on).await?))
}

async fn clone_instance(
    State(plane): State<Plane>,
    caller: Caller,
    Path(name): Path<String>,
    Json(request): Json<CloneRequest>,
) -> Answer<Json<Vec<InstanceView>>> {
    caller.user()?;
    Ok(Json(plane.clone_instance(&parse(&name)?, request).await?))
}

async fn move_instance(
    State(plane): State<Plane>,
    caller: Caller,
    Path(name): Path<String>,
    Json(request): Json<MoveRequest>,
) -> Answer<Json<OperationView>> {
    caller.user()?;
    Ok(Json(plane.move_instance(&parse(&name)?, request).await?))
}

async fn operate(
    State(plane): State<Plane>,
    caller: Caller,
    Path(name): Path<String>,
    Json(request): Json<OperationRequest>,
) -> Answer<Json<OperationView>> {
    caller.user()?;
    Ok(Json(plane.operate(&parse(&name)?, request).await?))
}

async fn history(State(plane): State<Plane>, caller: Caller, Path(name): Path<String>) -> Answer<Json<Vec<Event>>> {
    caller.user()?;
    let row = plane.row(&parse(&name)?).await?;
    Ok(Json(plane.database().events(&row.spec.id).await?))
}

async fn operation(
    State(plane): State<Plane>,
    caller: Caller,
    Path(id): Path<String>,
    Query(wait): Query<Wait>,
) -> Answer<Json<OperationView>> {
    caller.user()?;
    wait.for_change(&plane).await;
    Ok(Json(plane.operation_view(&parse::<OperationId>(&id)?).await?))
}

/// A connection whose client asked for it to become a stream of bytes.
struct Stream(Option<OnUpgrade>);

impl<S: Send + Sync> FromRequestParts<S> for Stream {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let asked = parts.headers.get(UPGRADE).is_some_and(|value| value == TUNNEL_PROTOCOL);
        Ok(Self(if asked { parts.extensions.remove::<OnUpgrade>() } else { None }))
    }
}

fn switching() -> Response {
    (StatusCode::SWITCHING_PROTOCOLS, [(CONNECTION, "upgrade"), (UPGRADE, TUNNEL_PROTOCOL)]).into_response()
}

async fn open_tunnel(
    State(plane): State<Plane>,
    caller: Caller,
    Path(name): Path<String>,
    stream: Stream,
    Json(target): Json<TunnelTarget>,
) -> Answer<Response> {
    caller.user()?;
    let user = stream.0.ok_or_else(|| Failure::invalid("a tunnel needs a connection that can be upgraded"))?;
    splice(user, plane.open_tunnel(&parse(&name)?, target).await?);
    Ok(switching())
}

async fn tunnel_between(
    State(plane): State<Plane>,
    caller: Caller,
    Path(id): Path<String>,
    stream: Stream,
) -> Answer<Response> {
    let from = stream.0.ok_or_else(|| Failure::invalid("a tunnel needs a connection that can be upgraded"))?;
    splice(from, plane.tunnel_between(caller.host()?, &parse(&id)?).await?);
    Ok(switching())
}

async fn take(State(plane): State<Plane>, caller: Caller, Path(id): Path<String>) -> Answer<Json<Spec>> {
    Ok(Json(plane.take(caller.host()?, &parse(&id)?).await?))
}

async fn stay(
    State(plane): State<Plane>,
    caller: Caller,
    Path(id): Path<String>,
    Json(request): Json<StayRequest>,
) -> Answer<Json<StayAnswer>> {
    Ok(Json(plane.stay(caller.host()?, &parse(&id)?, request).await?))
}

async fn tunnel_answered(
    State(plane): State<Plane>,
    caller: Caller,
    Path(id): Path<String>,
    stream: Stream,
    Json(answer): Json<TunnelAnswer>,
) -> Answer<Response> {
    let id: TunnelId = parse(&id)?;
    let wanted = plane.tunnel_answered(caller.host()?, &id, answer, stream.0)?;
    Ok(if wanted { switching() } else { Json(()).into_response() })
}
