//! Where the API is and by what we prove who we are: a kubeconfig, or the service account of the pod.

use kube::{
    Config,
    client::AuthError,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tracing::warn;

use super::{KubeOptions, without_credentials};
use crate::leases::{LeaseError, error::chain};

/// The configuration by client-go's rules: a file, a URL that overrides what the file says, or the pod's service account. What a person
/// should know besides an error is said at the first time only.
pub(super) async fn configure(options: &KubeOptions, is_first: bool) -> Result<Config, LeaseError> {
    let mut config = read(options, is_first).await?;
    trim_token(&mut config);
    Ok(config)
}

async fn read(options: &KubeOptions, is_first: bool) -> Result<Config, LeaseError> {
    let refuse = |cause: String| LeaseError::KubeConfig { cause };
    let url = options
        .api_url
        .as_deref()
        .map(|url| {
            let with_scheme = if url.contains("://") {
                url.to_owned()
            } else {
                format!("http://{url}")
            };
            with_scheme.parse::<http::Uri>().map_err(|error| {
                refuse(format!(
                    "--kube-api-url={}: {error}: write one such as https://10.0.0.1:6443",
                    without_credentials(url)
                ))
            })
        })
        .transpose()?;
    let Some(path) = &options.kubeconfig else {
        if let Some(url) = url {
            return Ok(Config::new(url));
        }
        return Config::incluster().map_err(|error| {
            if is_first {
                warn!(
                    "Neither --kubeconfig nor --master was specified.  Using the inClusterConfig.  This might not work."
                );
                warn!(
                    "error creating inClusterConfig, falling back to default config: {}",
                    chain(&error)
                );
            }
            refuse(
                "invalid configuration: no configuration has been provided, try setting KUBERNETES_MASTER environment variable: \
                 name one with --kubeconfig-file, or run in a pod with a service account"
                    .to_owned(),
            )
        });
    };
    let told = |error: &KubeconfigError| {
        refuse(format!(
            "--kubeconfig-file={}: {}",
            path.display(),
            without_secrets(error)
        ))
    };
    let mut kubeconfig = Kubeconfig::read_from(path).map_err(|error| told(&error))?;
    if let Some(url) = url {
        for named in &mut kubeconfig.clusters {
            named.cluster.get_or_insert_default().server = Some(url.to_string());
        }
    }
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(|error| told(&error))
}

/// A token from a file counts without the newline behind it, as for client-go.
fn trim_token(config: &mut Config) {
    let auth = &mut config.auth_info;
    let Some(path) = auth.token_file.as_ref().filter(|_| auth.token.is_none()) else {
        return;
    };
    if let Ok(text) = std::fs::read_to_string(path)
        && text.trim() != text
    {
        // It is read again when it is refused, not every minute.
        auth.token = Some(text.trim().to_owned().into());
    }
}

/// An error and its sources, without what it quotes of a kubeconfig, or of what an exec plugin prints.
pub(super) fn without_secrets(error: &(dyn std::error::Error + 'static)) -> String {
    let mut next = Some(error);
    while let Some(error) = next {
        match error.downcast_ref::<AuthError>() {
            Some(AuthError::AuthExecRun { out, .. }) => {
                return format!("the exec plugin of the kubeconfig failed: {}", out.status);
            }
            Some(AuthError::AuthExecParse(_)) => {
                return "what the exec plugin of the kubeconfig prints cannot be read".to_owned();
            }
            _ => {}
        }
        if let Some(KubeconfigError::Parse(parse)) = error.downcast_ref::<KubeconfigError>() {
            let place = parse.location().map_or_else(String::new, |place| {
                format!(" at line {} column {}", place.line(), place.column())
            });
            return format!("this is not a kubeconfig in YAML: it cannot be read{place}");
        }
        next = error.source();
    }
    chain(error)
}
