//! Arguments of `receive`, and of the agent that receives.

use clap::Args;

use super::requests::ReceiveRequest;
use super::settings::FlagValues;
use super::settings_table::Id;

/// Arguments of `receive`.
#[derive(Args)]
pub struct ReceiveArgs {
    /// The most WAL that may be lost with the server, as time [env: HIGHWATER_RPO] [default: 1s]
    #[arg(long, value_name = "TIME")]
    rpo: Option<String>,
    /// Store each commit at once: for servers whose synchronous_standby_names names us
    /// [env: HIGHWATER_SYNCHRONOUS]
    #[arg(long)]
    synchronous: bool,
    /// The replication slot, or none; made if it is not there [env: HIGHWATER_SLOT]
    /// [default: highwater_ and the cluster's name]
    #[arg(long, value_name = "NAME")]
    slot: Option<String>,
    /// Pieces of WAL on their way to the store at a time [env: HIGHWATER_UPLOADS] [default: 8]
    #[arg(long, value_name = "N")]
    uploads: Option<String>,
    /// Follow a standby where no primary is to be found
    #[arg(long)]
    from_standby: bool,
    /// Follow a server whose timeline another server has replaced
    #[arg(long)]
    old_timeline: bool,
}

impl ReceiveArgs {
    pub(super) fn into_request(self, flags: &mut FlagValues) -> ReceiveRequest {
        flags.set(Id::Rpo, self.rpo);
        flags.set(Id::Synchronous, self.synchronous.then_some("on"));
        flags.set(Id::Slot, self.slot);
        flags.set(Id::Uploads, self.uploads);
        let Self { from_standby, old_timeline, .. } = self;
        ReceiveRequest { from_standby, old_timeline }
    }
}
