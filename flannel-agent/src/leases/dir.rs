//! Leases as files in one directory that all nodes share, for clusters without etcd and for tests.
//!
//! `<dir>/subnets/<key>` holds the same JSON as etcd would under the same key, `<dir>/config` the network
//! configuration. Files do not expire. Names that start with a dot are ours to write through and never leases.

mod files;
mod keeper;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use flannel_core::{
    acquire::{Identity, choose},
    lease::{Lease, SubnetKey},
};
use tokio::{sync::watch, time::Instant};
use tracing::debug;

use super::{
    Held, LeaseError, Offer, Outcome, Snapshot, View, addresses, conf_file, is_ours, log_acquired,
    log_decision, pick,
    retry::Backoff,
    table::{Raw, Reported, Table, overlap},
};

/// How often the directory is read without being told of a change.
pub const DEFAULT_RESCAN: Duration = Duration::from_secs(10);

/// Where the lease files are.
#[derive(Clone, Debug)]
pub struct DirOptions {
    /// The directory. It must exist; `subnets` below it is made at need.
    pub dir: PathBuf,
    /// The network configuration to use when `<dir>/config` does not exist.
    pub net_config_path: Option<PathBuf>,
    /// How often the directory is read without being told of a change, which is all there is on some network file
    /// systems: [`DEFAULT_RESCAN`] but in tests.
    pub rescan: Duration,
}

impl DirOptions {
    /// The directory, without another place for the network configuration.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        DirOptions {
            dir: dir.into(),
            net_config_path: None,
            rescan: DEFAULT_RESCAN,
        }
    }
}

/// The lease store in a directory.
#[derive(Debug)]
pub struct DirLeases {
    dir: PathBuf,
    net_config_path: Option<PathBuf>,
    rescan: Duration,
    reported: Reported,
}

impl DirLeases {
    pub(super) fn open(options: &DirOptions) -> Self {
        DirLeases {
            dir: options.dir.clone(),
            net_config_path: options.net_config_path.clone(),
            rescan: options.rescan,
            reported: Reported::default(),
        }
    }

    /// Another view of the same directory.
    pub(super) fn twin(&self) -> Self {
        DirLeases {
            dir: self.dir.clone(),
            net_config_path: self.net_config_path.clone(),
            rescan: self.rescan,
            reported: Reported::default(),
        }
    }

    pub(super) fn describe(&self) -> String {
        format!("directory {}", self.dir.display())
    }

    fn subnets(&self) -> PathBuf {
        self.dir.join("subnets")
    }

    pub(super) async fn net_conf(&self) -> Result<String, LeaseError> {
        let own = self.dir.join("config");
        let paths: Vec<&Path> = std::iter::once(own.as_path())
            .chain(self.net_config_path.as_deref())
            .collect();
        for path in &paths {
            match tokio::fs::read_to_string(path).await {
                Ok(text) => return Ok(text),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    return Err(LeaseError::NetConfText {
                        location: path.display().to_string(),
                    });
                }
                Err(source) => {
                    return Err(failed(
                        "read the network configuration, a JSON file, at",
                        path,
                    )(source));
                }
            }
        }
        let tried: Vec<String> = paths
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        Err(LeaseError::NoNetConfFile {
            tried: tried.join(", "),
        })
    }

    pub(super) async fn net_conf_after(&self, known: &str) -> String {
        let elsewhere = self.net_config_path.as_deref().and_then(Path::parent);
        let dirs: Vec<&Path> = std::iter::once(self.dir.as_path())
            .chain(elsewhere)
            .collect();
        conf_file::after(&dirs, self.rescan, || self.net_conf(), known).await
    }

    pub(super) async fn own_stored(&self, us: &Identity) -> Result<Option<Lease>, LeaseError> {
        let list = match self.scan().await {
            Ok(list) => list,
            Err(LeaseError::File { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound && self.dir.is_dir() =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let own = Table::from_list(&list, &self.reported)
            .stored(|_| false)
            .into_iter()
            .map(|stored| stored.lease)
            .find(|lease| is_ours(&lease.attrs, us));
        Ok(own)
    }

    pub(super) async fn snapshot(&self) -> Result<Snapshot, LeaseError> {
        let list = match self.scan().await {
            Ok(list) => list,
            // The first node makes it.
            Err(LeaseError::File { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound && self.dir.is_dir() =>
            {
                return Ok(Snapshot::default());
            }
            Err(error) => return Err(error),
        };
        Ok(Table::from_list(&list, &self.reported).snapshot(Instant::now()))
    }

    pub(super) async fn run(
        &self,
        held: Held,
        offer: watch::Receiver<Offer>,
        out: &watch::Sender<View>,
    ) {
        keeper::run(self, held, offer, out).await;
    }

    async fn scan(&self) -> Result<Vec<Raw>, LeaseError> {
        let path = self.subnets();
        blocking("list leases in", path, files::scan).await
    }

    /// The name of the file that we write through. One per public address, so that crashes leave no heap of them.
    fn scratch(offer: &Offer) -> String {
        let name = addresses(&offer.attrs).replace([' ', '/'], "_");
        format!(".{name}-{}", std::process::id())
    }

    /// Creates the file of a lease. `false` when it exists.
    async fn create(&self, key: &SubnetKey, offer: &Offer) -> Result<bool, LeaseError> {
        let (name, value) = (key.to_string(), offer.attrs.to_json());
        let scratch = Self::scratch(offer);
        let path = self.subnets();
        blocking("create a lease in", path, move |dir| {
            files::create(dir, &scratch, &name, &value)
        })
        .await
    }

    /// Puts a new content in place of the one of our lease file.
    async fn replace(&self, key: &SubnetKey, offer: &Offer) -> Result<(), LeaseError> {
        let (name, value) = (key.to_string(), offer.attrs.to_json());
        let scratch = Self::scratch(offer);
        let path = self.subnets();
        blocking("replace our lease in", path, move |dir| {
            files::replace(dir, &scratch, &name, &value)
        })
        .await
    }

    async fn remove(&self, key: &SubnetKey) -> Result<(), LeaseError> {
        let name = key.to_string();
        blocking("remove our lease from", self.subnets(), move |dir| {
            files::remove(dir, &name)
        })
        .await
    }

    pub(super) async fn acquire(&self, offer: &Offer) -> Result<Held, LeaseError> {
        blocking("create", self.subnets(), files::ensure_dir).await?;
        let mut logged = Vec::new();
        let mut backoff = Backoff::new();
        loop {
            let table = Table::from_list(&self.scan().await?, &self.reported);
            let stored = table.stored(|_| false);
            let decision = choose(&offer.conf, &offer.identity, offer.previous, &stored)
                .map_err(LeaseError::Acquire)?;
            let dropped = decision.drop_incompatible.map(|(key, _)| key);
            let (key, outcome) = pick(&decision.choice)?;
            logged = log_decision(decision, offer, &logged);
            let won = match outcome {
                Outcome::Reused => self.replace(&key, offer).await.map(|()| true)?,
                Outcome::Previous | Outcome::New => {
                    self.create(&key, offer).await? && self.keep_if_alone(&key, dropped).await?
                }
            };
            if won {
                if let Some(old) = dropped {
                    self.remove(&old).await?;
                }
                let attrs = offer.attrs.clone();
                let held = Held {
                    lease: Lease { key, attrs },
                    outcome,
                    grip: None,
                };
                log_acquired(&held, &offer.identity);
                return Ok(held);
            }
            debug!(%key, "another node was faster, choosing again");
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// Takes our new file back if another one shares addresses with it: the file system only excludes equal names.
    /// Two nodes that see each other both give way, and try again at different times.
    async fn keep_if_alone(
        &self,
        key: &SubnetKey,
        dropped: Option<SubnetKey>,
    ) -> Result<bool, LeaseError> {
        let alone = !self
            .scan()
            .await?
            .iter()
            .filter_map(|raw| raw.name.parse::<SubnetKey>().ok())
            .any(|other| other != *key && Some(other) != dropped && overlap(&other, key));
        if !alone {
            self.remove(key).await?;
        }
        Ok(alone)
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LeaseError {
    let path = path.to_owned();
    move |source| LeaseError::File {
        action,
        path,
        source,
    }
}

/// Runs a function of the file system where it may block; `path` is its argument and named in its error.
async fn blocking<T: Send + 'static>(
    action: &'static str,
    path: PathBuf,
    work: impl FnOnce(&Path) -> std::io::Result<T> + Send + 'static,
) -> Result<T, LeaseError> {
    let task = tokio::task::spawn_blocking(move || work(&path).map_err(failed(action, &path)));
    match task.await {
        Ok(done) => done,
        Err(_) => Err(LeaseError::Worker { action }),
    }
}
