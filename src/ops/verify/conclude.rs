//! From what is wrong to what it means and what to do.

use std::pin::pin;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::Verifying;
use super::findings::{About, Acknowledged, Fault, Finding, LostMoments, Raw, Report};
use super::losses::Gone;
use crate::failure::Failure;
use crate::format::{
    Acknowledgement, BackupId, Depth, FINDINGS_NAMED_MAX, KeyObject, WalObject, parse_acknowledged,
    parse_drill, parse_gap, parse_pin, parse_proof,
};
use crate::ops::now;
use crate::pg::{Lsn, SystemId};
use crate::repo::RepoError;
use crate::store::Key;

/// How many documents of one kind are read at a time.
const DOCUMENTS_IN_FLIGHT: usize = 8;

/// What is known of one thing that is wrong.
struct Meaning {
    consequence: String,
    lost_moments: Vec<LostMoments>,
}

impl Verifying<'_> {
    /// Looks at pins, at history files that are missing, and for objects that are none of ours.
    pub(super) async fn look_at_small_things(&mut self) -> Result<(), Failure> {
        self.look_at_pins();
        self.look_for_identities();
        self.look_for_histories();
        let repository = self.repository;
        let place = repository.place();
        let (pins, verify, known) =
            (place.pins_dir(), place.verify_dir(), place.acknowledged_dir());
        let let_go = place.gaps_dir();
        let root = Key::new(place.cluster().as_str());
        let level = self.repository.store().list_level(&root).await;
        let level = level.map_err(|error| self.failed(error.into(), "list the repository"))?;
        let mut strays: Vec<Key> = level.objects.into_iter().map(|listed| listed.key).collect();
        for name in level.directories {
            let directory = format!("{root}/{name}");
            let is_ours: fn(&str) -> bool = match name.as_str() {
                "backup" => continue,
                "wal" => {
                    self.look_for_strange_wal(&directory).await?;
                    continue;
                }
                "identity" => |tail| {
                    let id = tail.strip_suffix(".json");
                    id.is_some_and(|id| id.parse::<SystemId>().is_ok())
                },
                _ if directory == place.keys_dir() => {
                    let prove = async |object| repository.prove_key_document(object).await;
                    self.look_at_records(&directory, KeyObject::parse, prove, About::Key).await?;
                    continue;
                }
                _ if directory == place.drills_dir() => {
                    let prove = async |id: BackupId| repository.drill(&id).await.map(drop);
                    self.look_at_records(&directory, parse_drill, prove, About::Drill).await?;
                    continue;
                }
                _ if directory == pins => |tail| parse_pin(tail).is_some(),
                _ if directory == let_go => |tail| parse_gap(tail).is_some(),
                _ if directory == verify => |tail| parse_proof(tail).is_some(),
                _ if directory == known => |tail| parse_acknowledged(tail).is_some(),
                _ => |_| false,
            };
            let mut listing = self.repository.store().list(&Key::new(directory.clone()));
            while let Some(listed) = listing
                .try_next()
                .await
                .map_err(|error| self.failed(error.into(), "list the repository"))?
            {
                let tail = listed.key.as_str().strip_prefix(&directory);
                let tail = tail.and_then(|tail| tail.strip_prefix('/'));
                if !tail.is_some_and(is_ours) && strays.len() <= super::STRAYS_NAMED_MAX {
                    strays.push(listed.key);
                }
            }
        }
        for key in strays {
            self.stray(&key);
        }
        Ok(())
    }

    /// Reads the documents of a directory that `parse` knows by their names; what is deleted meanwhile is no loss.
    async fn look_at_records<T>(
        &mut self,
        directory: &str,
        parse: impl Fn(&str) -> Option<T>,
        prove: impl AsyncFn(T) -> Result<(), RepoError>,
        about: impl Fn(Key) -> About,
    ) -> Result<(), Failure> {
        let listing = self.repository.store().list(&Key::new(directory)).try_collect::<Vec<_>>();
        let failed = |error| self.failed(error, &format!("list `{directory}`"));
        let listing = listing.await.map_err(|error| failed(error.into()))?;
        let mut documents = Vec::new();
        for listed in listing {
            let tail = listed.key.as_str().strip_prefix(directory);
            match tail.and_then(|tail| tail.strip_prefix('/')).and_then(&parse) {
                Some(document) => documents.push((listed.key, document)),
                None => self.stray(&listed.key),
            }
        }
        let prove = &prove;
        let proving = stream::iter(documents)
            .map(async |(key, document)| (key, prove(document).await))
            .buffered(DOCUMENTS_IN_FLIGHT);
        let mut proving = pin!(proving);
        while let Some((key, proven)) = proving.next().await {
            self.check_stop().await?;
            self.checked += 1;
            let Err(error) = proven else { continue };
            let found = Fault::of(error);
            let (fault, why) =
                found.map_err(|error| self.failed(error, &format!("read `{key}`")))?;
            if fault != Fault::Missing {
                self.raw.push(Raw { about: about(key), fault, why });
            }
        }
        Ok(())
    }

    /// WAL of a cluster that has neither claimed the place nor left a backup in it.
    async fn look_for_strange_wal(&mut self, directory: &str) -> Result<(), Failure> {
        let level = self.repository.store().list_level(&Key::new(directory)).await;
        let level = level.map_err(|error| self.failed(error.into(), "list WAL"))?;
        for name in level.directories {
            let known = name.parse::<SystemId>().ok().and_then(|id| self.incarnation(id));
            if known.is_none() {
                self.notes.push(format!(
                    "`{directory}/{name}` is WAL of a cluster that has not claimed this place"
                ));
            }
        }
        for listed in level.objects {
            self.stray(&listed.key);
        }
        Ok(())
    }

    fn look_at_pins(&mut self) {
        let pins = std::mem::take(&mut self.gathered.pins);
        for (id, pins) in pins {
            let is_there = self
                .gathered
                .stock
                .incarnations
                .iter()
                .any(|one| one.backups.iter().any(|backup| backup.id == id));
            for stored in pins {
                self.checked += 1;
                let key = stored.key;
                match stored.pin {
                    Ok(pin) if pin.backup != id => {
                        let why = format!("`{key}` pins backup {}", pin.backup);
                        let about = About::Pin(key);
                        self.raw.push(Raw { about, fault: Fault::Damaged, why });
                    }
                    Ok(_) if !is_there => {
                        self.notes.push(format!("`{key}` pins a backup that is none (any more)"));
                    }
                    Ok(_) => {}
                    Err(why) => {
                        let about = About::Pin(key);
                        self.raw.push(Raw { about, fault: Fault::Damaged, why });
                    }
                }
            }
        }
    }

    /// Whose backups are here has, or had, the place.
    fn look_for_identities(&mut self) {
        let all = self.gathered.stock.incarnations.iter().map(|one| one.system_id);
        for system_id in all.filter(|id| !self.claimed.contains(id)) {
            let key = Key::new(self.repository.place().identity(system_id));
            let is_told =
                |raw: &Raw| matches!(&raw.about, About::Identity(id, _) if *id == system_id);
            if !self.raw.iter().any(is_told) {
                let why = format!("`{key}` is not there");
                let about = About::Identity(system_id, key);
                self.raw.push(Raw { about, fault: Fault::Missing, why });
            }
        }
    }

    /// A timeline that anything is stored of needs the file that says where it came from.
    fn look_for_histories(&mut self) {
        let mut missing = Vec::new();
        for one in &self.gathered.stock.incarnations {
            let stored = self.gathered.inventories.get(&one.system_id);
            let of_backups = one.backups.iter().map(|backup| backup.stop_timeline);
            let mut timelines: Vec<_> = one.coverage.keys().copied().chain(of_backups).collect();
            timelines.sort_unstable();
            timelines.dedup();
            for timeline in timelines {
                let is_stored = stored.is_some_and(|wal| wal.histories.contains(&timeline));
                if timeline > crate::pg::Timeline::FIRST && !is_stored {
                    missing.push((one.system_id, timeline));
                }
            }
        }
        for (system_id, timeline) in missing {
            let key = Key::new(self.repository.place().history(system_id, timeline));
            let why = format!("`{key}` is not there");
            let about = About::History(system_id, timeline, key);
            self.raw.push(Raw { about, fault: Fault::Missing, why });
        }
    }

    /// Makes the report.
    pub(super) async fn conclude(&mut self) -> Result<Report, Failure> {
        let mut raw = std::mem::take(&mut self.raw);
        let known = std::mem::take(&mut self.known);
        self.checked += known.len() as u64;
        raw.sort_unstable();
        raw.dedup();
        self.raw = raw;
        let is_stored_all_the_same = |this: &Self, raw: &Raw| {
            matches!(raw.about, About::Accepted(..)) && this.is_covered(raw)
        };
        let raw: Vec<Raw> =
            self.raw.iter().filter(|raw| !is_stored_all_the_same(self, raw)).cloned().collect();
        let mut findings = Vec::new();
        let mut findings_unnamed = 0;
        for raw in raw {
            let acknowledged = known.iter().find(|one| one.finding == raw.id()).map(who_knows);
            if findings.len() >= FINDINGS_NAMED_MAX {
                findings_unnamed += u64::from(acknowledged.is_none());
                continue;
            }
            let finding = self.finding(&raw, acknowledged, findings.len()).await?;
            findings.push(finding);
        }
        // What nobody knows of yet first.
        findings.sort_by_key(|finding| finding.acknowledged.is_some());
        Ok(Report {
            cluster: self.repository.cluster().to_string(),
            repository: self.repository.describe(),
            deep: self.request.depth == Depth::Whole,
            started_at: self.started_at,
            finished_at: now(),
            backups: self.backups,
            checked: self.checked,
            skipped: self.skipped,
            read_bytes: self.read_bytes,
            findings,
            findings_unnamed,
            notes: self.notes(),
        })
    }

    fn notes(&mut self) -> Vec<String> {
        let mut notes = std::mem::take(&mut self.notes);
        if self.unfinished > 0 {
            notes.push(format!(
                "{} backups are unfinished, or left of deleted ones",
                self.unfinished
            ));
        }
        if self.unneeded > 0 {
            notes.push(format!(
                "{} objects of {} bytes belong to no backup that exists, or to one that runs; expire removes them in time",
                self.unneeded, self.unneeded_bytes
            ));
        }
        if self.redundant_pieces > 0 {
            notes.push(format!(
                "{} pieces of WAL stand beside the whole segment that holds them too",
                self.redundant_pieces
            ));
        }
        if self.ledger.unreadable > 0 {
            notes.push(format!(
                "{} objects with proofs of earlier runs could not be read; what they told was proven again",
                self.ledger.unreadable
            ));
        }
        notes.extend(
            self.strays.iter().map(|key| format!("`{key}` is none of Highwater's objects")),
        );
        if self.strays_unnamed > 0 {
            notes.push(format!("{} more objects are none of Highwater's", self.strays_unnamed));
        }
        notes
    }

    /// Returns whether a segment that was accepted as damaged is stored whole besides.
    fn is_covered(&self, raw: &Raw) -> bool {
        let Some((system_id, Gone::Wal { timeline: Some(timeline), start_lsn, end_lsn })) =
            self.wal_of(raw)
        else {
            return false;
        };
        let ranges = self.incarnation(system_id).and_then(|one| one.coverage.get(&timeline));
        let covers = |range: &(Lsn, Lsn)| range.0 <= start_lsn && end_lsn <= range.1;
        ranges.is_some_and(|ranges| ranges.iter().any(covers))
    }

    async fn finding(
        &self,
        raw: &Raw,
        acknowledged: Option<Acknowledged>,
        number: usize,
    ) -> Result<Finding, Failure> {
        let meaning = self.meaning(raw, number).await?;
        let lost_backups = match &raw.about {
            About::Backup(id, _) | About::Committed(id, _) => vec![id.clone()],
            _ => Vec::new(),
        };
        Ok(Finding {
            id: raw.id(),
            fault: raw.fault.word(),
            object: raw.object().map(ToString::to_string),
            what: raw.what(),
            consequence: meaning.consequence,
            lost_backups,
            lost_moments: meaning.lost_moments,
            remedy: remedy(raw),
            acknowledged,
        })
    }

    async fn meaning(&self, raw: &Raw, number: usize) -> Result<Meaning, Failure> {
        let plain = |text: &str| Meaning { consequence: text.to_owned(), lost_moments: Vec::new() };
        let gone = match &raw.about {
            About::Backup(id, _) => {
                let all = &self.gathered.stock.incarnations;
                let of = all.iter().find(|one| one.backups.iter().any(|backup| backup.id == *id));
                of.map(|one| (one.system_id, Gone::Backup(id)))
            }
            _ => self.wal_of(raw),
        };
        if let Some((system_id, gone)) = gone {
            let moments = self.lost_moments(system_id, &gone);
            let lost_moments = self.timed(system_id, moments, number).await?;
            let first = match &raw.about {
                About::Backup(id, _) => format!("Backup {id} cannot be restored."),
                _ => String::new(),
            };
            let consequence = in_words(&first, &lost_moments);
            return Ok(Meaning { consequence, lost_moments });
        }
        Ok(match &raw.about {
            About::Identity(..) => plain(
                "Whose place this is is not known: archiving, backup and restore of this cluster refuse to work. What else is stored is not touched by it.",
            ),
            About::Rival(_, segment, _) => Meaning {
                consequence: format!(
                    "Recovery takes the complete segment. If that is another server's and the pieces are this cluster's, nothing that was committed from {segment} on comes back while it stands there."
                ),
                lost_moments: Vec::new(),
            },
            About::History(_, timeline, _) => Meaning {
                consequence: format!(
                    "No recovery can follow timeline {timeline}: what was written on it, and on timelines that left it, cannot be reached."
                ),
                lost_moments: Vec::new(),
            },
            About::Committed(id, _) => Meaning {
                consequence: format!(
                    "Backup {id} cannot be restored, and moments that only it reaches are lost; which these are is not known."
                ),
                lost_moments: Vec::new(),
            },
            About::Wal(_, WalObject::File(_), _) => plain(
                "No moment is lost: recovery does not depend on this file where the WAL beside it is whole.",
            ),
            About::Begun(..) => plain(
                "No moment is lost: restore does not need it. Until the backup is deleted, expire keeps everything that it may lean on.",
            ),
            About::LetGo(_) => plain(
                "No moment is lost by it: it told why WAL is missing, which is a finding of its own.",
            ),
            About::Pin(_) => {
                plain("No moment is lost: its backup is kept until the pin is taken off.")
            }
            About::Drill(_) => {
                plain("No moment is lost; what that drill has proved is not known any more.")
            }
            About::Key(_) => plain(
                "Whoever holds only the user key that it is about cannot open what is stored under the repository key that it is about. Other user keys open it as before.",
            ),
            About::Acknowledgement(_) => {
                plain("No moment is lost; what it acknowledged is told as new.")
            }
            _ => plain("No backup that exists needs it: no moment is lost."),
        })
    }
}

fn who_knows(one: &Acknowledgement) -> Acknowledged {
    Acknowledged { at: one.acknowledged_at, reason: one.reason.clone(), host: one.host.clone() }
}

fn in_words(first: &str, moments: &[LostMoments]) -> String {
    let mut sentences: Vec<String> = Vec::new();
    if !first.is_empty() {
        sentences.push(first.to_owned());
    }
    if moments.is_empty() {
        sentences.push(
            "No moment is lost: each can be reached from another backup, or from none in any case."
                .to_owned(),
        );
    }
    for one in moments {
        let of = |time: Option<crate::pg::PgTimestamp>, what: &str| {
            time.map_or_else(String::new, |time| format!(" ({what} {time})"))
        };
        let from = if one.from_is_lost {
            format!("From {}{}", one.from_lsn, of(one.from_time, "the earliest time was"))
        } else {
            format!("Behind {}{}", one.from_lsn, of(one.from_time, "last commit before it"))
        };
        let to = if one.open {
            format!("up to the end of WAL at {}", one.to_lsn)
        } else {
            format!("to {}{}", one.to_lsn, of(one.to_time, "reached again from"))
        };
        sentences
            .push(format!("{from} {to} on timeline {} no moment can be reached.", one.timeline));
    }
    sentences.join(" ")
}

/// Says what to do.
fn remedy(raw: &Raw) -> String {
    if raw.fault == Fault::Unreadable {
        return "Nothing need be wrong with it: run `verify` with the version of Highwater that wrote it, or a newer one.".to_owned();
    }
    let backup_now = "Take a backup now: from then on everything can be reached again.";
    let copy = "If there is another copy of the repository, put this object back from there (move the damaged one away first).";
    let text = match &raw.about {
        About::Hole(..) => format!(
            "If the server still has these segments in pg_wal, archive them: `highwater archive-push`. {backup_now}"
        ),
        About::Accepted(..) => backup_now.to_owned(),
        About::Wal(_, WalObject::File(crate::pg::WalFileName::Backup(..)), _) => {
            format!("{copy} It may be deleted as well: recovery by Highwater does not read it.")
        }
        About::Wal(..) => format!(
            "{copy} If the server still has the segment in pg_wal, move the damaged object away and archive it again. Else: {}{}",
            backup_now[..1].to_lowercase(),
            &backup_now[1..]
        ),
        About::Backup(..) | About::Committed(..) => {
            format!("{copy} Else take a new backup, and let expire delete this one in time.")
        }
        About::Identity(..) => {
            format!(
                "{copy} Else move it away and run `highwater init` with the cluster's server, which claims the place again."
            )
        }
        About::History(..) => format!(
            "{copy} A server of that timeline has the file in pg_wal: move the damaged object away and store it with `highwater archive-push`."
        ),
        About::Begun(..) => copy.to_owned(),
        About::Pin(_) => {
            "Take the pins off with `highwater unpin` and pin the backup again.".to_owned()
        }
        About::Drill(_) => "Delete it, and run `highwater drill` again.".to_owned(),
        About::Changed(_) => "Was it put back after damage? Then say so. Else look at the disk or the bucket, and run `highwater verify --deep --all`.".to_owned(),
        About::Rival(..) => "Find the other server: most often a copy of this cluster that was started with archiving on; stop it. Then move away whichever is its own, the complete segment or the pieces; segments behind it may be its own too.".to_owned(),
        About::Key(_) => format!(
            "{copy} Else move it away and, with a user key that opens everything, give the other one again: `highwater key add`."
        ),
        About::LetGo(_) => "Delete it: a hole in WAL is found without it.".to_owned(),
        About::Acknowledgement(_) => "Delete it, and acknowledge the finding again.".to_owned(),
    };
    format!(
        "{text} Known and accepted? `highwater verify --acknowledge {} --reason '…'`.",
        raw.id()
    )
}
