//! Where a store lies, and the way into a bucket.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, Checksum, S3ConditionalPut};
use object_store::path::Path as Key;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use super::{Depot, DepotError};

/// Uploads are cut into parts of this many bytes, each sent, timed and tried again by itself: a whole pack of 64 MiB
/// would need a line of 18 Mbit/s to pass in the time of one request.
pub(super) const PART: usize = 8 << 20;
/// Before the first repetition.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Where a store's own rules of the region do not matter, every name does.
const ANY_REGION: &str = "us-east-1";

/// Where a plane keeps its packs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a folder of its own.
    Local,
    /// In a bucket.
    S3(Bucket),
}

/// A bucket, and the folder in it that is the store: `s3://BUCKET/PREFIX`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    name: String,
    /// Without slashes around it; empty for the whole bucket.
    prefix: String,
}

/// Not a [`Place`].
#[derive(Debug, thiserror::Error)]
#[error("\"{0}\" is no place for a store: expected s3://BUCKET, s3://BUCKET/PREFIX or the word local")]
pub struct PlaceError(String);

impl FromStr for Place {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        if text == "local" {
            return Ok(Self::Local);
        }
        let rest = text.strip_prefix("s3://").ok_or_else(|| PlaceError(text.into()))?;
        let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let prefix = prefix.trim_end_matches('/');
        let parts_are_plain = prefix.is_empty()
            || prefix.split('/').all(|part| part.bytes().all(plain) && !matches!(part, "" | "." | ".."));
        if name.is_empty() || !name.bytes().all(plain) || !parts_are_plain {
            return Err(PlaceError(text.into()));
        }
        Ok(Self::S3(Bucket { name: name.into(), prefix: prefix.into() }))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::S3(bucket) if bucket.prefix.is_empty() => write!(f, "s3://{}", bucket.name),
            Self::S3(bucket) => write!(f, "s3://{}/{}", bucket.name, bucket.prefix),
        }
    }
}

/// Who asks, and where. Secrets are never shown.
#[derive(Clone, Default)]
pub struct Access {
    /// `https://HOST[:PORT]`, or `http://...` where nobody listens in between; Amazon's own where there is none.
    pub endpoint: Option<String>,
    /// As requests are signed for; most other stores take any.
    pub region: Option<String>,
    /// The name of the secret.
    pub key_id: Option<String>,
    /// The secret that requests are signed with.
    pub secret: Option<String>,
    /// Comes with a key that expires.
    pub session_token: Option<String>,
    /// How long to try.
    pub patience: Patience,
}

/// How long requests may take, and how often they are repeated. A read, with all of it, stays below the two minutes that
/// clients of the plane wait for an answer.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For one request and its answer.
    pub request: Duration,
    /// Repetitions, with growing and random pauses between them.
    pub retries: usize,
    /// The longest pause.
    pub pause: Duration,
    /// No repetition begins later than this.
    pub total: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { request: seconds(30), retries: 6, pause: seconds(4), total: seconds(20) }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Access")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

/// The environment variables that [`Access::from_environment`] reads.
pub const VARIABLES: [&str; 7] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
];

impl Access {
    /// From the environment variables that tools for S3 have in common.
    pub fn from_environment() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            endpoint: set("AWS_ENDPOINT_URL_S3").or_else(|| set("AWS_ENDPOINT_URL")),
            region: set("AWS_REGION").or_else(|| set("AWS_DEFAULT_REGION")),
            key_id: set("AWS_ACCESS_KEY_ID"),
            secret: set("AWS_SECRET_ACCESS_KEY"),
            session_token: set("AWS_SESSION_TOKEN"),
            patience: Patience::default(),
        }
    }

    fn builder(&self) -> Result<AmazonS3Builder, String> {
        let (Some(key_id), Some(secret)) = (&self.key_id, &self.secret) else {
            return Err("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set in the plane's environment".into());
        };
        let region = match (&self.region, &self.endpoint) {
            (Some(region), _) => region,
            (None, Some(_)) => ANY_REGION,
            (None, None) => return Err("AWS_REGION must be set, or AWS_ENDPOINT_URL for a store elsewhere".into()),
        };
        let mut builder = AmazonS3Builder::new()
            .with_access_key_id(key_id)
            .with_secret_access_key(secret)
            .with_region(region)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            // Servers compare it with what came. Not all of them do so with the digest in the signature.
            .with_checksum_algorithm(Checksum::SHA256)
            // One request of the core protocol in place of a document, for one object at a time.
            .with_disable_bulk_delete(true)
            .with_retry(self.retry())
            .with_client_options(self.client());
        if let Some(token) = &self.session_token {
            builder = builder.with_token(token);
        }
        match &self.endpoint {
            Some(endpoint) if endpoint.starts_with("https://") => builder = builder.with_endpoint(endpoint),
            Some(endpoint) if endpoint.starts_with("http://") => builder = builder.with_endpoint(endpoint),
            Some(endpoint) => {
                return Err(format!("AWS_ENDPOINT_URL is \"{endpoint}\"; it must begin with https:// or http://"));
            }
            None => {}
        }
        Ok(builder)
    }

    fn retry(&self) -> RetryConfig {
        // A longest pause below the first would be an empty range to choose from, and a panic.
        let max_backoff = self.patience.pause.max(FIRST_PAUSE);
        let backoff = BackoffConfig { init_backoff: FIRST_PAUSE, max_backoff, base: 2.0 };
        RetryConfig { backoff, max_retries: self.patience.retries, retry_timeout: self.patience.total }
    }

    fn client(&self) -> ClientOptions {
        let plain = self.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        ClientOptions::new()
            .with_allow_http(plain)
            .with_connect_timeout(self.patience.request.min(Duration::from_secs(5)))
            .with_timeout(self.patience.request)
    }
}

impl Depot {
    /// In a bucket. Nothing is asked of it yet.
    pub fn s3(bucket: &Bucket, access: &Access) -> Result<Self, DepotError> {
        let place = Place::S3(bucket.clone()).to_string();
        let wrong = |why: String| DepotError::Settings { place: place.clone(), why };
        let builder = access.builder().map_err(wrong)?.with_bucket_name(&bucket.name);
        let objects = builder.build().map_err(|error| wrong(error.to_string()))?;
        let objects: Arc<dyn ObjectStore> = match bucket.prefix.as_str() {
            "" => Arc::new(objects),
            prefix => Arc::new(PrefixStore::new(objects, Key::from(prefix))),
        };
        Ok(Self::over(objects, place, Some(PART)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_written() {
        for good in ["local", "s3://bucket", "s3://my.bucket-1/a/b_c"] {
            assert_eq!(good.parse::<Place>().unwrap().to_string(), good);
        }
        assert_eq!("s3://bucket/a/".parse::<Place>().unwrap().to_string(), "s3://bucket/a");
        for bad in [
            "",
            "/srv",
            "s3:/bucket",
            "s3://",
            "s3:///a",
            "s3://b/../c",
            "s3://b//c",
            "s3://key:secret@b/c",
            "s3://b?x",
        ] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_that_cannot_work_are_refused_and_secrets_stay_secret() {
        let Place::S3(bucket) = "s3://bucket/a".parse().unwrap() else { unreachable!() };
        let refused = |access: &Access| Depot::s3(&bucket, access).err().unwrap().to_string();
        let mut access = Access::default();
        assert!(refused(&access).contains("AWS_ACCESS_KEY_ID"));
        (access.key_id, access.secret) = (Some("name".into()), Some("hunter2".into()));
        access.session_token = Some("hunter3".into());
        assert!(refused(&access).contains("AWS_REGION"));
        access.endpoint = Some("127.0.0.1:9000".into());
        assert!(refused(&access).contains("https://"));
        access.endpoint = Some("http://127.0.0.1:9000".into());
        assert!(Depot::s3(&bucket, &access).is_ok());
        assert!(!format!("{access:?}").contains("hunter"));
    }
}
