//! Looking for rules of others that drop what ours accept.

use flannel_core::{
    addr::Family,
    masquerade::{
        Request,
        backend::Backend,
        iptables::FILTER,
        obstacle::{in_iptables, in_nftables},
    },
};

use super::{
    Trouble,
    programs::{self, PATIENCE, Tools},
};
use crate::program;

/// What drops forwarded packets of pods, one line each.
pub(super) async fn look(requests: &[Option<Request>; 2]) -> Vec<Trouble> {
    let mut found = Vec::new();
    for (family, request) in Family::ALL.into_iter().zip(requests) {
        let Some(request) = request.filter(|request| request.forward) else {
            continue;
        };
        let tools = Tools::find(family).await;
        for backend in Backend::ALL {
            let Some(tool) = tools.of(backend) else {
                continue;
            };
            let Ok(dump) = tool.dump(family).await else {
                continue;
            };
            let command = format!("{}-{}", programs::name(family), backend.as_str());
            found.extend(in_iptables(dump.table(FILTER), &request.network, &command));
        }
        if programs::in_use(Backend::Nft, family)
            && let Ok(listed) = program::run("nft", &["-j", "list", "ruleset"], "", PATIENCE).await
        {
            found.extend(in_nftables(&listed, &request.network));
        }
    }
    found.into_iter().map(Trouble::note).collect()
}
