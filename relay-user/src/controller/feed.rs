//! What Asterisk says, and what becomes of its calls.

use std::{collections::BTreeSet, mem, time::Duration};

use super::{Controller, ControllerError};
use crate::{
    ami::{CallId, FeedEvent},
    control::model::{AmiState, Feed, PairState},
    events::{Subject, TransitionKind},
    pair::Pair,
    registry::{Claim, Origin},
};

impl Controller {
    /// Takes in what Asterisk says.
    ///
    /// # Errors
    /// [`ControllerError`].
    pub async fn feed(&mut self, event: FeedEvent) -> Result<(), ControllerError> {
        // Whatever happens to a call puts the operator's word about it behind.
        match &event {
            FeedEvent::Up { .. } => self.dismissed.clear(),
            FeedEvent::TakeBack { call, .. }
            | FeedEvent::Refused { call, .. }
            | FeedEvent::Gone { call } => {
                self.dismissed.remove(call);
            }
            FeedEvent::Offer { call, .. } if self.dismissed.contains(call) => return Ok(()),
            _ => {}
        }
        match event {
            FeedEvent::Up { asterisk } => self.ami_up(asterisk),
            FeedEvent::Down { cause } => self.ami_down(cause).await?,
            FeedEvent::Synced => {
                self.drop_unconfirmed("Asterisk knows it no longer").await?;
            }
            FeedEvent::Offer {
                call,
                pair,
                channels,
                rtp_timeout,
            } => self.offer(call, pair, channels, rtp_timeout).await?,
            FeedEvent::Refused {
                call,
                channels,
                name,
                cause,
            } => {
                self.count_refusal(name.to_owned());
                self.set_aside(&call, Some(channels), PairState::Refused, cause)
                    .await?;
            }
            FeedEvent::TakeBack { call, cause } => {
                self.set_aside(&call, None, PairState::Waiting, cause)
                    .await?;
            }
            FeedEvent::Gone { call } => {
                if let Some(id) = self.registry.id(&call) {
                    self.forget(id, TransitionKind::TakenBack, "the bridge is over")
                        .await?;
                }
            }
        }
        Ok(())
    }

    fn ami_up(&mut self, asterisk: String) {
        tracing::info!(%asterisk, "AMI is up");
        let subject = Subject::feed(Feed::Ami);
        self.events
            .publish(subject, TransitionKind::AmiUp, asterisk.as_str());
        if let Some(ami) = &mut self.ami {
            ami.state = AmiState::Up;
            ami.asterisk = Some(asterisk);
            ami.cause = None;
        }
    }

    /// Asterisk cannot be asked. Its calls go on for a while: most losses are short, and the wire
    /// shows what Asterisk does in the meantime.
    async fn ami_down(&mut self, cause: String) -> Result<(), ControllerError> {
        let Some(ami) = &mut self.ami else {
            return Ok(());
        };
        let before = mem::replace(&mut ami.state, AmiState::Down);
        ami.cause = Some(cause.clone());
        if before == AmiState::Down {
            return Ok(());
        }
        let grace = self.settings.ami_grace;
        tracing::warn!(%cause, grace_s = grace.as_secs_f64(), "AMI is down");
        self.events
            .publish(Subject::feed(Feed::Ami), TransitionKind::AmiDown, cause);
        self.unconfirmed = self.registry.ami_ids();
        self.expect_confirmation(grace);
        if grace == Duration::ZERO {
            self.drop_unconfirmed("AMI is down").await?;
        }
        Ok(())
    }

    /// Takes back the calls that Asterisk has not confirmed.
    pub(super) async fn drop_unconfirmed(&mut self, why: &str) -> Result<(), ControllerError> {
        self.confirmation = None;
        let unconfirmed: BTreeSet<u64> = mem::take(&mut self.unconfirmed);
        if !unconfirmed.is_empty() {
            tracing::warn!(calls = unconfirmed.len(), why, "taken back");
        }
        for id in unconfirmed {
            self.forget(id, TransitionKind::TakenBack, why).await?;
        }
        Ok(())
    }

    async fn offer(
        &mut self,
        call: CallId,
        pair: Pair,
        channels: [String; 2],
        rtp_timeout: [Option<Duration>; 2],
    ) -> Result<(), ControllerError> {
        let channels = channels.to_vec();
        let claim = Claim {
            pair: pair.clone(),
            rtp_timeout,
        };
        let known = self
            .registry
            .held_as(&call, &pair)
            .or_else(|| self.registry.recognise(&call, &claim, &channels));
        if let Some(id) = known {
            // Asterisk says that nothing has changed: what was suspended may be proven again.
            self.unconfirmed.remove(&id);
            return self.restart(id).await;
        }
        for earlier in self.registry.in_the_way(&pair) {
            match self.registry.call(earlier).cloned() {
                Some(other) if other != call => {
                    tracing::info!(call = %other, by = %call, "its address went to another call");
                    let why = format!("its address belongs to call {call} now");
                    self.set_aside(&other, None, PairState::Waiting, why)
                        .await?;
                }
                Some(_) => {}
                None => {
                    let why = "its address belongs to another call now";
                    self.forget(earlier, TransitionKind::TakenBack, why).await?;
                }
            }
        }
        // Nothing of the earlier offer may stay, even where no address is shared.
        let why = "its addresses changed".to_owned();
        self.set_aside(&call, None, PairState::Waiting, why).await?;

        let origin = Origin::Ami {
            call: call.clone(),
            channels: channels.clone(),
        };
        match self.add(origin, pair, rtp_timeout).await? {
            Ok(id) => tracing::debug!(%call, id, "offered by Asterisk"),
            Err(refusal) => {
                let cause = refusal.to_string();
                tracing::warn!(%call, %cause, "left with Asterisk");
                self.set_aside(&call, Some(channels), PairState::Refused, cause)
                    .await?;
            }
        }
        Ok(())
    }

    /// Leaves a call with the PBX, and remembers why.
    pub(super) async fn set_aside(
        &mut self,
        call: &CallId,
        channels: Option<Vec<String>>,
        state: PairState,
        why: String,
    ) -> Result<(), ControllerError> {
        let held = self
            .registry
            .id(call)
            .is_some_and(|id| self.registry.is_held(id));
        let changes = self.registry.set_aside(call, channels, state, why.clone());
        if let Some(id) = self.registry.id(call) {
            let leftovers = self.wire.end(id);
            self.proofs.end(id);
            self.withdraw(&leftovers);
            self.unconfirmed.remove(&id);
            if held {
                self.tell(id, None, TransitionKind::TakenBack, &why);
            }
            if state == PairState::Refused {
                self.tell(id, None, TransitionKind::Refused, &why);
            }
        }
        self.apply(changes).await
    }
}
