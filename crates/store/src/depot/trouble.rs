//! What goes wrong behind a store, in words for people, and whether trying again helps.
//!
//! Errors of the object store are never passed on as they are: answers of S3 may quote the session token.

use std::error::Error as _;

use object_store::Error;
use object_store::client::{HttpError, HttpErrorKind};

/// What kind of trouble it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TroubleKind {
    /// It does not answer, or says that it is busy: trying again later may help.
    Away,
    /// It does not let the plane in.
    Denied,
    /// There is no such bucket.
    NoBucket,
    /// There is no space left.
    Full,
    /// Something else.
    Other,
}

/// What goes wrong behind a store.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot {doing} the store {place}: {why}; {}", self.advice())]
pub struct Trouble {
    /// What kind.
    pub kind: TroubleKind,
    /// What was attempted, as in "cannot ... the store".
    doing: String,
    place: String,
    why: String,
    /// Whether the same request may well succeed at once.
    pub(super) passing: bool,
}

impl Trouble {
    pub(super) fn new(kind: TroubleKind, doing: &str, place: &str, why: impl Into<String>) -> Self {
        let passing = kind == TroubleKind::Away;
        Self { kind, doing: doing.into(), place: place.into(), why: why.into(), passing }
    }

    pub(super) fn of(error: &Error, doing: &str, place: &str) -> Self {
        let mut text = error.to_string();
        let mut transport = None;
        let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
        while let Some(inner) = cause {
            if let Some(io) = inner.downcast_ref::<std::io::Error>()
                && io.kind() == std::io::ErrorKind::StorageFull
            {
                return Self::new(TroubleKind::Full, doing, place, "it is full");
            }
            if let Some(http) = inner.downcast_ref::<HttpError>() {
                transport = Some(http.kind());
            }
            // The deepest words are the system's own: "connection refused".
            text = inner.to_string();
            cause = inner.source();
        }
        match answer(&error.to_string()) {
            Some(answer) => Self { passing: answer.code == "BadDigest", ..answer.trouble(doing, place) },
            None => {
                let trouble = Self::new(silent(error, transport), doing, place, silence(transport, text));
                // These were repeated already.
                let passing =
                    trouble.passing && !matches!(transport, Some(HttpErrorKind::Connect | HttpErrorKind::Timeout));
                Self { passing, ..trouble }
            }
        }
    }

    fn advice(&self) -> &'static str {
        match self.kind {
            TroubleKind::Away => {
                "see that it answers and repeat the command; machines go on, and those that need something wait for it"
            }
            TroubleKind::Denied => {
                "put AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN right in the plane's environment and \
                 start the plane again"
            }
            TroubleKind::NoBucket => "make the bucket, or start the plane with the right --store",
            TroubleKind::Full => "free space and repeat the command",
            TroubleKind::Other => "see that the store is in order and repeat the command",
        }
    }
}

/// Without an answer. A local folder that fails is not away.
fn silent(error: &Error, transport: Option<HttpErrorKind>) -> TroubleKind {
    match (transport, error) {
        (Some(_), _) | (None, Error::Generic { store: "S3", .. }) => TroubleKind::Away,
        _ => TroubleKind::Other,
    }
}

fn silence(transport: Option<HttpErrorKind>, words: String) -> String {
    match transport {
        Some(HttpErrorKind::Connect) if words.contains("certificate") => {
            format!("its certificate is not accepted ({words}); SSL_CERT_FILE can name a file with the authority's")
        }
        Some(HttpErrorKind::Connect) => format!("it cannot be reached ({words})"),
        Some(HttpErrorKind::Timeout) => "it did not answer in time".into(),
        Some(_) => format!("the connection broke ({words})"),
        None => words,
    }
}

/// A refusal as S3 words it.
struct Answer {
    status: u16,
    code: String,
    message: String,
}

/// Status, code and message only: the rest of the document may have secrets.
fn answer(text: &str) -> Option<Answer> {
    let (_, rest) = text.split_once("status code: ")?;
    let status = rest.get(..3)?.parse().ok()?;
    let element = |name: &str| {
        let (_, rest) = rest.split_once(&format!("<{name}>"))?;
        let (inside, _) = rest.split_once(&format!("</{name}>"))?;
        Some(inside.chars().filter(|c| !c.is_control()).take(200).collect::<String>())
    };
    let code = element("Code").unwrap_or_default();
    Some(Answer { status, code, message: element("Message").unwrap_or_default() })
}

impl Answer {
    fn trouble(&self, doing: &str, place: &str) -> Trouble {
        let kind = match (self.code.as_str(), self.status) {
            ("NoSuchBucket", _) => TroubleKind::NoBucket,
            ("ExpiredToken" | "InvalidToken" | "RequestExpired" | "TokenRefreshRequired", _) => TroubleKind::Denied,
            (_, 401 | 403) => TroubleKind::Denied,
            (_, 507) | ("QuotaExceeded" | "XMinioStorageFull", _) => TroubleKind::Full,
            (_, 408 | 429 | 500..=599) => TroubleKind::Away,
            _ => TroubleKind::Other,
        };
        let words = match (self.code.is_empty(), self.message.is_empty()) {
            (false, false) => {
                format!("it answers {} {}: {}", self.status, self.code, self.message.trim_end_matches('.'))
            }
            (false, true) => format!("it answers {} {}", self.status, self.code),
            _ => format!("it answers {}", self.status),
        };
        let hint = if self.code == "RequestTimeTooSkewed" { " (is this machine's clock right?)" } else { "" };
        Trouble::new(kind, doing, place, words + hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble(status: &str, body: &str) -> Trouble {
        let source =
            format!("Error performing GET http://s/b/k in 1s - Server returned non-2xx status code: {status}: {body}");
        Trouble::of(&Error::Generic { store: "S3", source: source.into() }, "read", "s3://b")
    }

    #[test]
    fn refusals_are_named_and_secrets_in_them_are_not_shown() {
        let body = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message>\
                    <Token-0>hunter2</Token-0></Error>";
        let expired = trouble("400 Bad Request", body);
        assert_eq!(expired.kind, TroubleKind::Denied);
        let text = format!("{expired} {expired:?}");
        assert!(text.contains("400 ExpiredToken: The provided token has expired; put AWS_"), "{text}");
        assert!(!text.contains("hunter2"));
        assert_eq!(trouble("503 Service Unavailable", "busy").kind, TroubleKind::Away);
        assert_eq!(trouble("403 Forbidden", "").kind, TroubleKind::Denied);
        assert_eq!(trouble("404 Not Found", "<Code>NoSuchBucket</Code>").kind, TroubleKind::NoBucket);
        assert!(trouble("400 Bad Request", "<Code>BadDigest</Code>").passing);
    }
}
