// The 3D view: the mesh of the page, turned by mouse, touch and keyboard. It is drawn only when something changes.
(() => {
  'use strict';
  const canvas = document.getElementById('mesh');
  const state = document.getElementById('mesh-state');
  const say = (text) => { state.textContent = text; state.hidden = !text; };
  const bytes = (text) => {
    const raw = atob(text);
    const found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i += 1) found[i] = raw.charCodeAt(i);
    return found.buffer;
  };

  let renderer;
  try {
    if (!document.createElement('canvas').getContext('webgl2')) throw new Error('none');
    renderer = new THREE.WebGLRenderer({ canvas, antialias: true, alpha: true });
  } catch {
    say('This browser has no WebGL 2, which the 3D view needs.');
    return;
  }
  const scene = new THREE.Scene();
  scene.add(new THREE.AmbientLight(0xffffff, Math.PI)); // for a mesh whose material asks for light
  const camera = new THREE.PerspectiveCamera(35, 1, 0.01, 100);
  const controls = new THREE.OrbitControls(camera, canvas);
  controls.enableDamping = !matchMedia('(prefers-reduced-motion: reduce)').matches;
  Object.assign(controls, { dampingFactor: 0.2, enablePan: false });

  let waiting = false;
  const draw = () => {
    waiting = false;
    if (controls.update()) ask();
    renderer.render(scene, camera);
  };
  const ask = () => {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  };
  controls.addEventListener('change', ask);
  const fit = () => {
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!width || !height) return;
    renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
    renderer.setSize(width, height, false);
    camera.aspect = width / height;
    camera.updateProjectionMatrix();
    ask();
  };
  new ResizeObserver(fit).observe(canvas);

  let radius = 1;
  const home = () => { // in front: the front of a glTF asset faces +z
    const { enableDamping } = controls;
    controls.enableDamping = false; // a turn that is still on its way ends here
    controls.update();
    controls.enableDamping = enableDamping;
    const narrow = Math.min(1, camera.aspect);
    const far = 0.95 * radius / (Math.sin(camera.fov * Math.PI / 360) * narrow);
    Object.assign(controls, { minDistance: far / 8, maxDistance: far * 4 });
    Object.assign(camera, { near: far / 100, far: far * 10 });
    camera.position.copy(controls.target).add(new THREE.Vector3(0, 0.25, 1).setLength(far));
    camera.updateProjectionMatrix();
    ask();
  };
  const turn = (right, up) => {
    const arm = camera.position.clone().sub(controls.target);
    const at = new THREE.Spherical().setFromVector3(arm);
    at.theta += right;
    at.phi = Math.min(Math.PI - 0.05, Math.max(0.05, at.phi - up));
    camera.position.copy(controls.target).add(arm.setFromSpherical(at));
    ask();
  };
  const zoom = (factor) => {
    const arm = camera.position.clone().sub(controls.target);
    const far = Math.min(controls.maxDistance, Math.max(controls.minDistance, arm.length() * factor));
    camera.position.copy(controls.target).add(arm.setLength(far));
    ask();
  };
  const STEP = Math.PI / 18;
  const keys = {
    ArrowLeft: () => turn(-STEP, 0),
    ArrowRight: () => turn(STEP, 0),
    ArrowUp: () => turn(0, STEP),
    ArrowDown: () => turn(0, -STEP),
    '+': () => zoom(1 / 1.15),
    '=': () => zoom(1 / 1.15), // the same key without Shift
    '-': () => zoom(1.15),
    0: home,
  };
  canvas.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  const buttons = { in: keys['+'], out: keys['-'], home };
  for (const button of document.querySelectorAll('[data-mesh]')) {
    button.addEventListener('click', buttons[button.dataset.mesh]);
  }

  const broken = (error) => say(`The mesh cannot be shown: ${error.message || error}`);
  try {
    new THREE.GLTFLoader().parse(bytes(document.getElementById('mesh-data').textContent), '', (gltf) => {
      const ball = new THREE.Box3().setFromObject(gltf.scene).getBoundingSphere(new THREE.Sphere());
      if (!(ball.radius > 0)) {
        broken('it has no surface');
        return;
      }
      radius = ball.radius;
      controls.target.copy(ball.center);
      scene.add(gltf.scene);
      fit();
      home();
      say('');
      canvas.dataset.ready = 'true';
    }, broken);
  } catch (error) {
    broken(error);
  }
})();
