// Runs an exported model from Rust, by its foreign function interface, from the shared library.
//
//     rustc -O run.rs
//     ./run ./libtransformer.so transformer transformer.input transformer.output
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::{env, error::Error, fs, mem, ptr, slice};

#[repr(C)]
struct TensorInfo {
    name: *const c_char,
    dtype: c_int,
    rank: c_int,
    shape: *const i64,
}

extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}
const RTLD_NOW: c_int = 2;

type Plan = *mut c_void;
type PlanFn = unsafe extern "C" fn(*mut u8, usize, *const *const i64, c_int, *mut Plan) -> c_int;
type RunFn = unsafe extern "C" fn(Plan, *mut c_void, *mut u8, usize, *const *const u8, *const *mut u8) -> c_int;

struct Library {
    handle: *mut c_void,
    name: String,
}

impl Library {
    fn open(path: &str, name: &str) -> Result<Library, Box<dyn Error>> {
        let handle = unsafe { dlopen(CString::new(path)?.as_ptr(), RTLD_NOW) };
        if handle.is_null() {
            return Err(format!("{path} cannot be loaded").into());
        }
        Ok(Library { handle, name: name.to_string() })
    }

    // F is the type of a function pointer, as the header declares it.
    unsafe fn function<F: Copy>(&self, name: &str) -> Result<F, Box<dyn Error>> {
        let full = format!("{}_{}", self.name, name);
        let address = dlsym(self.handle, CString::new(full.as_str())?.as_ptr());
        if address.is_null() {
            return Err(format!("the library has no {full}").into());
        }
        Ok(mem::transmute_copy(&address))
    }

    fn check(&self, status: c_int) -> Result<(), Box<dyn Error>> {
        if status == 0 {
            return Ok(());
        }
        unsafe {
            let text: unsafe extern "C" fn(c_int) -> *const c_char = self.function("status_text")?;
            Err(CStr::from_ptr(text(status)).to_string_lossy().into())
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().collect();
    let [_, path, name, source, target] = arguments.as_slice() else {
        return Err("usage: run LIBRARY NAME INPUT OUTPUT".into());
    };
    let library = Library::open(path, name)?;
    let input = fs::read(source)?;
    unsafe {
        let input_info: unsafe extern "C" fn(c_int) -> *const TensorInfo = library.function("input")?;
        let plan_bytes: unsafe extern "C" fn() -> usize = library.function("plan_bytes")?;
        let make_plan: PlanFn = library.function("plan")?;
        let workspace_bytes: unsafe extern "C" fn(Plan) -> usize = library.function("workspace_bytes")?;
        let output_bytes: unsafe extern "C" fn(Plan, c_int) -> usize = library.function("output_bytes")?;
        let run: RunFn = library.function("run")?;

        let info = &*input_info(0);
        let mut shape = slice::from_raw_parts(info.shape, info.rank as usize).to_vec();
        let row: i64 = 4 * shape[1..].iter().product::<i64>();
        shape[0] = input.len() as i64 / row;
        println!("{}: {shape:?}", CStr::from_ptr(info.name).to_string_lossy());

        let mut memory = vec![0u8; plan_bytes()];
        let mut plan: Plan = ptr::null_mut();
        library.check(make_plan(memory.as_mut_ptr(), memory.len(), [shape.as_ptr()].as_ptr(), 1, &mut plan))?;
        let mut workspace = vec![0u8; workspace_bytes(plan)];
        let mut output = vec![0u8; output_bytes(plan, 0)];
        let (inputs, outputs) = ([input.as_ptr()], [output.as_mut_ptr()]);
        let status = run(
            plan, ptr::null_mut(), workspace.as_mut_ptr(), workspace.len(), inputs.as_ptr(), outputs.as_ptr(),
        );
        library.check(status)?;
        fs::write(target, output)?;
    }
    Ok(())
}
