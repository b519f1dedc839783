//! Any bytes as frames of the agent's protocol, in both directions, and as documents for the VMM.
#![no_main]

use agent_protocol::v1;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Ok(Some(message)) = agent_protocol::read::<v1::FromAgent>(&mut rest) {
        let frame = agent_protocol::encode(&message).expect("what was read can be written");
        assert_eq!(agent_protocol::read(frame.as_slice()).expect("a frame"), Some(message));
    }
    let mut rest = bytes;
    while let Ok(Some(message)) = agent_protocol::read::<v1::Request>(&mut rest) {
        let frame = agent_protocol::encode(&message).expect("what was read can be written");
        assert_eq!(agent_protocol::read(frame.as_slice()).expect("a frame"), Some(message));
    }
    let _config = serde_json::from_slice::<vmm_control::Config>(bytes);
    let _request = serde_json::from_slice::<vmm_control::Command>(bytes);
    let _events = vmm_control::read_events(bytes);
});
