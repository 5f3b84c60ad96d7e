//! The routes of what is published, and of the store that it is in.

use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::header::{CONTENT_RANGE, RANGE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use collective_api::{
    ApplianceView, ChannelHead, Collected, KeyUpdate, PackWaste, PublishVersion, Repacked, StoreView, VersionDetail,
    VersionView,
};
use collective_keys::Signed;
use collective_model::{ApplianceName, Digest};
use collective_store::pack::MAX_PACK_BYTES;
use serde::Deserialize;

use crate::Plane;
use crate::access::Caller;
use crate::http::{parse, range_of};
use crate::problem::{Answer, Failure};

pub(crate) fn routes() -> Router<Plane> {
    Router::new()
        .route("/v1/appliances", get(search))
        .route("/v1/appliances/{publisher}/{name}/versions", post(publish))
        .route("/v1/appliances/{publisher}/{name}/channels/{channel}", put(set_channel).get(get_channel))
        .route("/v1/publishers/{publisher}/key", post(change_key))
        .route("/v1/resolve", get(resolve))
        .route("/v1/appliances/{publisher}/{name}/leases/{id}", put(hold_lease).delete(end_lease))
        .route("/v1/versions/{version}", get(version).delete(withdraw))
        .route("/v1/store", get(store))
        .route("/v1/store/collect", post(collect))
        .route("/v1/store/repack", get(wasted).post(repack))
}

/// Bodies of these are packs.
pub(crate) fn pack_routes() -> Router<Plane> {
    Router::new()
        .route("/v1/appliances/{publisher}/{name}/packs/{pack}", put(put_pack).get(get_pack))
        .layer(DefaultBodyLimit::max(MAX_PACK_BYTES as usize))
}

fn appliance(publisher: &str, name: &str) -> Answer<ApplianceName> {
    parse(&format!("{publisher}/{name}"))
}

#[derive(Deserialize)]
struct Search {
    #[serde(default)]
    query: String,
}

async fn search(
    State(plane): State<Plane>,
    caller: Caller,
    Query(search): Query<Search>,
) -> Answer<Json<Vec<ApplianceView>>> {
    caller.reader()?;
    Ok(Json(plane.search(&search.query).await?))
}

async fn publish(
    State(plane): State<Plane>,
    caller: Caller,
    Path((publisher, name)): Path<(String, String)>,
    Json(request): Json<PublishVersion>,
) -> Answer<Json<VersionView>> {
    caller.user()?;
    Ok(Json(plane.publish(&appliance(&publisher, &name)?, request).await?))
}

async fn put_pack(
    State(plane): State<Plane>,
    caller: Caller,
    Path((publisher, name, pack)): Path<(String, String, String)>,
    body: Bytes,
) -> Answer<Json<()>> {
    caller.user()?;
    let (appliance, pack) = (appliance(&publisher, &name)?, parse(&pack)?);
    plane.make_way(&appliance, &pack).await?;
    plane.depot().put_pack(&appliance, pack, body).await?;
    Ok(Json(()))
}

async fn hold_lease(
    State(plane): State<Plane>,
    caller: Caller,
    Path((publisher, name, id)): Path<(String, String, String)>,
) -> Answer<Json<()>> {
    caller.user()?;
    Ok(Json(plane.hold_lease(&appliance(&publisher, &name)?, &id).await?))
}

async fn end_lease(
    State(plane): State<Plane>,
    caller: Caller,
    Path((_, _, id)): Path<(String, String, String)>,
) -> Answer<Json<()>> {
    caller.user()?;
    Ok(Json(plane.database().end_lease(&id).await?))
}

async fn withdraw(State(plane): State<Plane>, caller: Caller, Path(version): Path<String>) -> Answer<Json<()>> {
    caller.user()?;
    Ok(Json(plane.withdraw(&parse(&version)?).await?))
}

async fn store(State(plane): State<Plane>, caller: Caller) -> Answer<Json<StoreView>> {
    caller.user()?;
    Ok(Json(plane.store_view().await?))
}

async fn wasted(State(plane): State<Plane>, caller: Caller) -> Answer<Json<Vec<PackWaste>>> {
    caller.user()?;
    Ok(Json(plane.wasted().await?))
}

async fn repack(State(plane): State<Plane>, caller: Caller) -> Answer<Json<Repacked>> {
    caller.user()?;
    Ok(Json(plane.repack().await?))
}

async fn collect(State(plane): State<Plane>, caller: Caller) -> Answer<Json<Collected>> {
    caller.user()?;
    Ok(Json(plane.collect().await?))
}

/// A pack's bytes by range; without one, its size as JSON.
async fn get_pack(
    State(plane): State<Plane>,
    caller: Caller,
    Path((publisher, name, pack)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Answer<Response> {
    caller.reader()?;
    let (appliance, pack) = (appliance(&publisher, &name)?, parse::<Digest>(&pack)?);
    let Some(range) = headers.get(RANGE) else {
        return Ok(Json(plane.pack_in_use(&appliance, &pack).await?).into_response());
    };
    let range = range_of(Some(range))?;
    let bytes = plane.depot().read(&appliance, &pack, range.clone()).await?;
    let range = [(CONTENT_RANGE, format!("bytes {}-{}/*", range.start, range.end - 1))];
    Ok((StatusCode::PARTIAL_CONTENT, range, bytes).into_response())
}

async fn set_channel(
    State(plane): State<Plane>,
    caller: Caller,
    Path((publisher, name, channel)): Path<(String, String, String)>,
    Json(pointer): Json<Signed>,
) -> Answer<Json<()>> {
    caller.user()?;
    Ok(Json(plane.set_channel(&appliance(&publisher, &name)?, &parse(&channel)?, pointer).await?))
}

async fn get_channel(
    State(plane): State<Plane>,
    caller: Caller,
    Path((publisher, name, channel)): Path<(String, String, String)>,
) -> Answer<Json<ChannelHead>> {
    caller.reader()?;
    let row = plane.channel(&appliance(&publisher, &name)?, &parse(&channel)?).await?;
    Ok(Json(ChannelHead { pointer: row.pointer }))
}

async fn change_key(
    State(plane): State<Plane>,
    caller: Caller,
    Path(publisher): Path<String>,
    Json(update): Json<KeyUpdate>,
) -> Answer<Json<()>> {
    caller.user()?;
    Ok(Json(plane.change_key(&parse(&publisher)?, update).await?))
}

#[derive(Deserialize)]
struct Resolve {
    reference: String,
}

async fn resolve(
    State(plane): State<Plane>,
    caller: Caller,
    Query(query): Query<Resolve>,
) -> Answer<Json<VersionDetail>> {
    caller.reader()?;
    let row = plane.resolve(&parse(&query.reference)?).await?;
    Ok(Json(plane.detail(row).await?))
}

async fn version(
    State(plane): State<Plane>,
    caller: Caller,
    Path(version): Path<String>,
) -> Answer<Json<VersionDetail>> {
    caller.reader()?;
    let digest: Digest = parse(&version)?;
    let row = plane.database().version(&digest).await?;
    let row = row.ok_or_else(|| Failure::missing(format!("version {digest} is not published here")))?;
    Ok(Json(plane.detail(row).await?))
}
