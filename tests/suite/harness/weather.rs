//! A way to the store on which a test makes the weather: delays, cuts, no way at all.

use super::lab::Random;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What happens to bytes on the way, in both directions.
#[derive(Debug, Clone, Copy)]
pub enum Weather {
    /// They arrive.
    Fair,
    /// Each block is held for a random time below `delay_max`, and one in `cut_one_in` never arrives: its
    /// connection is closed instead, so that requests are lost, and answers too.
    Rough { delay_max: Duration, cut_one_in: u64 },
    /// Nothing arrives and nothing is closed, as when a cable is pulled.
    Still,
    /// Every connection is closed.
    Gone,
}

/// The way to a store on this host.
pub struct Way {
    pub port: u16,
    weather: Arc<Mutex<Sky>>,
}

struct Sky {
    weather: Weather,
    random: Random,
}

impl Way {
    /// Opens a way to a port, in fair weather. It stands until the test program ends.
    pub fn to(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let sky = Sky { weather: Weather::Fair, random: Random::new("weather") };
        let weather = Arc::new(Mutex::new(sky));
        let shared = Arc::clone(&weather);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(("127.0.0.1", upstream));
                let Ok(server) = server else { continue };
                // As a cable, it waits for nothing.
                server.set_nodelay(true).and(client.set_nodelay(true)).ok();
                let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
                for (from, to) in [(client, server), back] {
                    let sky = Arc::clone(&shared);
                    std::thread::spawn(move || carry(from, to, &sky));
                }
            }
        });
        Self { port, weather }
    }

    /// Makes the weather from now on.
    pub fn set(&self, weather: Weather) {
        self.weather.lock().unwrap().weather = weather;
    }
}

/// How often is looked whether it is still.
const STILL_PAUSE: Duration = Duration::from_millis(50);

fn carry(mut from: TcpStream, mut to: TcpStream, sky: &Mutex<Sky>) {
    let mut block = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut block) {
        if !wait_as_weather_has_it(sky) || to.write_all(&block[..count]).is_err() {
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}

/// Returns whether a block arrives, when it would.
fn wait_as_weather_has_it(sky: &Mutex<Sky>) -> bool {
    while matches!(sky.lock().unwrap().weather, Weather::Still) {
        std::thread::sleep(STILL_PAUSE);
    }
    let (delay, arrives) = {
        let Sky { weather, random } = &mut *sky.lock().unwrap();
        match *weather {
            Weather::Gone => (Duration::ZERO, false),
            Weather::Fair | Weather::Still => (Duration::ZERO, true),
            Weather::Rough { delay_max, cut_one_in } => {
                let micros = u64::try_from(delay_max.as_micros()).unwrap();
                (Duration::from_micros(random.below(micros + 1)), random.below(cut_one_in) > 0)
            }
        }
    };
    std::thread::sleep(delay);
    arrives
}
