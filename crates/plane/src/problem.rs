//! Failures as HTTP answers: a status for programs, a sentence for people.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use collective_api::Problem;
use collective_store::depot::{DepotError, TroubleKind};
use sqlx::error::ErrorKind;

/// Why a request fails.
#[derive(Debug)]
pub struct Failure {
    status: StatusCode,
    message: String,
}

/// What handlers return.
pub type Answer<T> = Result<T, Failure>;

impl Failure {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// The request contradicts itself or the rules.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, message)
    }

    /// There is no such thing.
    pub fn missing(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// It contradicts what is there.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// Not with this token.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// Somebody else is away; trying again later may help.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// Our own fault; details go to the log as well.
    pub fn internal(message: impl Into<String>) -> Self {
        let message = message.into();
        tracing::error!(message, "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(Problem { error: self.message })).into_response()
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        let full = error.as_database_error().and_then(|e| e.code()).is_some_and(|code| code == "13");
        if full {
            return Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "the plane's disk is full; free space on it and repeat the command",
            );
        }
        let refused = error.as_database_error().map(|error| error.kind());
        if matches!(refused, Some(ErrorKind::ForeignKeyViolation | ErrorKind::UniqueViolation)) {
            return Self::conflict("somebody else changed what this refers to just now; repeat the command");
        }
        Self::internal(format!("the plane's database failed: {error}"))
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::internal(format!("a record in the plane's database cannot be read: {error}"))
    }
}

impl From<DepotError> for Failure {
    fn from(error: DepotError) -> Self {
        let status = match &error {
            DepotError::Name { .. } | DepotError::Unsound { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            DepotError::Missing(_) => StatusCode::NOT_FOUND,
            DepotError::Range(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            DepotError::Backend(trouble) => match trouble.kind {
                TroubleKind::Full => StatusCode::INSUFFICIENT_STORAGE,
                TroubleKind::Away | TroubleKind::Other => StatusCode::SERVICE_UNAVAILABLE,
                TroubleKind::Denied | TroubleKind::NoBucket => StatusCode::BAD_GATEWAY,
            },
            DepotError::Settings { .. }
            | DepotError::Owned { .. }
            | DepotError::Unclaimed { .. }
            | DepotError::Unconditional { .. } => StatusCode::BAD_GATEWAY,
        };
        Self::new(status, error.to_string())
    }
}
