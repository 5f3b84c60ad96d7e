//! The routes of private data: backups, their packs, and the owner's keys.

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::header::{CONTENT_RANGE, RANGE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use collective_api::{Backup, KeyCopy, KeyView, KeyWanted, PrivateGrant};
use collective_store::pack::MAX_PACK_BYTES;

use crate::Plane;
use crate::access::{AtHome, Caller};
use crate::http::{parse, range_of};
use crate::problem::Answer;

pub(crate) fn routes() -> Router<Plane> {
    let packs = Router::new()
        .route("/v1/private/{instance}/packs/{pack}", put(put_pack).get(get_pack))
        .layer(DefaultBodyLimit::max(MAX_PACK_BYTES as usize));
    Router::new()
        .route("/v1/backups", get(backups))
        .route("/v1/backups/{id}", delete(delete_backup))
        .route("/v1/hosts/self/operations/{id}/private", post(grant))
        .route("/v1/hosts/self/instances/{id}/private", post(arrival_grant))
        .route("/v1/hosts/self/operations/{id}/backup", post(record))
        .route("/v1/key", get(key))
        .route("/v1/key/export", post(export_key))
        .route("/v1/key/import", post(import_key))
        .route("/v1/key/new", post(new_key))
        .merge(packs)
}

async fn backups(State(plane): State<Plane>, caller: Caller) -> Answer<Json<Vec<Backup>>> {
    caller.user()?;
    Ok(Json(plane.database().backups(None).await?))
}

async fn delete_backup(State(plane): State<Plane>, caller: Caller, Path(id): Path<String>) -> Answer<Json<()>> {
    caller.user()?;
    Ok(Json(plane.delete_backup(&parse(&id)?).await?))
}

async fn grant(State(plane): State<Plane>, caller: Caller, Path(id): Path<String>) -> Answer<Json<PrivateGrant>> {
    Ok(Json(plane.private_grant(caller.host()?, &parse(&id)?).await?))
}

async fn arrival_grant(
    State(plane): State<Plane>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Json<PrivateGrant>> {
    Ok(Json(plane.arrival_grant(caller.host()?, &parse(&id)?).await?))
}

async fn record(
    State(plane): State<Plane>,
    caller: Caller,
    Path(id): Path<String>,
    Json(backup): Json<Backup>,
) -> Answer<Json<Backup>> {
    Ok(Json(plane.record_backup(caller.host()?, &parse(&id)?, backup).await?))
}

async fn put_pack(
    State(plane): State<Plane>,
    caller: Caller,
    Path((instance, pack)): Path<(String, String)>,
    body: Bytes,
) -> Answer<Json<()>> {
    Ok(Json(plane.put_private(&caller, &parse(&instance)?, parse(&pack)?, body).await?))
}

async fn get_pack(
    State(plane): State<Plane>,
    caller: Caller,
    Path((instance, pack)): Path<(String, String)>,
    headers: HeaderMap,
) -> Answer<Response> {
    let range = range_of(headers.get(RANGE))?;
    let bytes = plane.read_private(&caller, &parse(&instance)?, &parse(&pack)?, range.clone()).await?;
    let range = [(CONTENT_RANGE, format!("bytes {}-{}/*", range.start, range.end - 1))];
    Ok((StatusCode::PARTIAL_CONTENT, range, bytes).into_response())
}

async fn key(State(plane): State<Plane>, caller: Caller) -> Answer<Json<KeyView>> {
    caller.user()?;
    Ok(Json(plane.key_view().await?))
}

async fn export_key(State(plane): State<Plane>, _: AtHome, Json(wanted): Json<KeyWanted>) -> Answer<Json<KeyCopy>> {
    Ok(Json(plane.export_key(wanted).await?))
}

async fn import_key(State(plane): State<Plane>, _: AtHome, Json(copy): Json<KeyCopy>) -> Answer<Json<KeyView>> {
    Ok(Json(plane.import_key(copy).await?))
}

async fn new_key(State(plane): State<Plane>, _: AtHome) -> Answer<Json<KeyView>> {
    Ok(Json(plane.new_key().await?))
}
