//! What an agent with the backend wireguard has left.

use flannel_core::{config::BackendKind, mark};

use super::{Act, Args, table};
use crate::{dataplane::netlink::Netlink, state::Bare, wireguard::key_file};

/// Removes the devices, with their routes. The private key stays: it is what other nodes know this one by, and may be the
/// operator's own.
pub(super) async fn remove(net: &Netlink, act: &Act, args: &Args) -> anyhow::Result<bool> {
    let state = Bare::read_of(&args.subnet_file, BackendKind::Wireguard);
    let known = state.is_ok_and(|state| state.is_some());
    let mut clean = true;
    for name in [mark::WIREGUARD_DEVICE, mark::WIREGUARD_DEVICE_V6] {
        let Some(device) = net.plain_device(name).await? else {
            continue;
        };
        if !known || !mark::is_our_wireguard(name, &device.kind) {
            table::line(&format!(
                "leave device {name}: nothing says that an agent of this node has made it"
            ));
            continue;
        }
        let what = format!("device {name} with its routes and peers");
        clean &= !act.announce(&what) || act.outcome(&what, net.delete_device(device.index).await);
    }
    let key = key_file::path();
    if known && key.exists() {
        table::line(&format!(
            "leave file {}: the node's private key",
            key.display()
        ));
    }
    Ok(clean)
}
