#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| collective_fuzz::machine(data));
