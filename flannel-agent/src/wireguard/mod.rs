//! The encrypted overlay: the kernel's wireguard devices, kept as `flannel_core::wireguard` wants them.
//!
//! Nothing is taken away at the end: the devices go on carrying traffic while no agent runs. They are all this node needs for its
//! peers to stay encrypted, and a device that goes takes its routes with it, after which packets for pods of other nodes would leave
//! by the default route, unencrypted.

mod keeper;
mod kernel;
pub(crate) mod key_file;
mod socket;

pub(crate) use keeper::{Keeper, Site};
pub use kernel::WireguardError;
pub(crate) use kernel::{Kernel, look, read};
